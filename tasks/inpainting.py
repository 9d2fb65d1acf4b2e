"""Inpainting: some elements of x are seen through noise, the others are hidden."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rtb_inverse.checks import check_count, check_number, one_number
from rtb_inverse.problems import GaussianNoise, InverseProblem
from rtb_inverse.randomness import made_on_cpu, seeded

MASKS = ("box", "half", "random", "scratches")


@made_on_cpu
def make_mask(kind: str, shape, hidden: float = 0.5, seed: int = 0) -> Tensor:
    """A boolean mask of `shape`, True where x is seen; the same for all channels.

    Args:
        kind: "box" hides the central box of half the length along every spatial axis; "half" hides the second half of the first
            spatial axis (the lower half of an image); "random" hides a share `hidden` of the positions, chosen by `seed`; "scratches" hides
            the strokes of a pen, one pixel wide, drawn one by one until that share of the positions is hidden; for images.
        shape: of x: (d,), (C, L), (C, H, W), ...

    Raises:
        ValueError: "scratches" for an x that is no image.
    """
    shape = torch.Size(shape)
    spatial = shape if len(shape) == 1 else shape[1:]
    seen = torch.ones(spatial, dtype=torch.bool)
    if kind == "box":
        seen[tuple(slice(n // 4, n // 4 + n // 2) for n in spatial)] = False
    elif kind == "half":
        seen[spatial[0] // 2 :] = False
    elif kind == "scratches":
        if len(spatial) != 2:
            raise ValueError(f"mask 'scratches' is for images: shape must be (C, H, W), got {tuple(shape)}")
        draw_scratches(seen, round(hidden * seen.numel()), seeded(seed))
    else:
        order = torch.randperm(spatial.numel(), generator=seeded(seed))
        seen.view(-1)[order[: round(hidden * spatial.numel())]] = False
    return seen.expand(shape).clone()


def draw_scratches(seen: Tensor, count: int, generator: torch.Generator) -> None:
    """Set `count` positions of an image (H, W) to False along random strokes: quadratic Bézier curves whose ends and bend lie at most about
    half an image apart."""
    size = torch.tensor(seen.shape)
    curve = torch.linspace(0, 1, 4 * int(size.max()), dtype=torch.float32)[:, None]
    while (hidden := int((~seen).sum())) < count:
        start, *ends = torch.rand((3, 2), generator=generator, dtype=torch.float32)
        bend, end = (start + 0.8 * (point - 0.5) for point in ends)
        stroke = ((1 - curve) ** 2 * start + 2 * curve * (1 - curve) * bend + curve**2 * end) * size
        for i, j in stroke.floor().long().tolist():
            if 0 <= i < size[0] and 0 <= j < size[1] and seen[i, j] and hidden < count:
                seen[i, j], hidden = False, hidden + 1


def read_mask(mask, shape) -> Tensor:
    """A mask that the user gave, as a boolean tensor of `shape`: a tensor, an array, nested lists, or the path of a .npy file or an image
    (brighter than half is seen); of x's shape or of its spatial shape."""
    if isinstance(mask, (str, Path)):
        path = Path(mask)
        if not path.is_file():
            raise FileNotFoundError(
                f"mask must be one of {', '.join(MASKS)}, an array or the path of a file, got {str(mask)!r}, which is none"
            )
        if path.suffix == ".npy":
            mask = np.load(path, allow_pickle=False)
        else:
            from PIL import Image, UnidentifiedImageError

            try:
                mask = np.asarray(Image.open(path).convert("L")) > 127
            except UnidentifiedImageError as error:
                raise ValueError(f"mask must be the path of a .npy file or an image, got {str(mask)!r}, which is neither") from error
    try:
        mask = torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"mask must be one of {', '.join(MASKS)}, an array or the path of a file, got {mask!r}") from error
    if mask.dtype.is_floating_point or mask.dtype.is_complex or not bool(((mask == 0) | (mask == 1)).all()):
        raise TypeError(f"mask must be boolean (True where x is seen) or integers 0 and 1, got dtype {mask.dtype}")
    if tuple(mask.shape) not in (tuple(shape), tuple(shape[1:])):
        raise ValueError(f"mask must have shape {tuple(shape)} or {tuple(shape[1:])}, got {tuple(mask.shape)}")
    return mask.bool().expand(shape).clone()


class Inpainting(InverseProblem):
    """y = x[mask] + noise_std n: y is the vector of the m seen elements, (B, m). `observed` takes it from an image.

    Args:
        shape: of x.
        mask: "box", "half", "random", "scratches" (see `make_mask`), or a mask of your own, True where x is seen (see `read_mask`).
        noise_std: standard deviation of the noise, > 0, in the units of x (whose range is the prior's own, usually [-1, 1]).
        hidden, seed: of the random mask and the scratches.

    Raises:
        ValueError: noise_std <= 0; a mask of another shape, or one that sees nothing. TypeError: a mask that is not boolean.
    """

    def __init__(self, shape, mask="box", noise_std: float = 0.1, hidden: float = 0.5, seed: int = 0):
        if not isinstance(shape, (tuple, list)):
            raise ValueError(f"shape must be that of x, (d,) or (C, H, W), got {shape!r}")
        shape = torch.Size(check_count("sizes in shape", size) for size in shape)
        check_number("hidden", hidden, 0, 1)
        seen = make_mask(mask, shape, hidden, seed) if isinstance(mask, str) and mask in MASKS else read_mask(mask, shape)
        if not seen.any():
            raise ValueError("mask must see at least one element of x, got a mask that is False everywhere")
        noise_std = one_number("noise_std", noise_std)
        super().__init__(self.observed, GaussianNoise(noise_std), linear=True)
        self.register_buffer("mask", seen)
        self.config = {"noise_std": float(noise_std), "shape": list(shape)}
        self.bind(shape)

    def observed(self, image: Tensor) -> Tensor:
        """The seen elements of images (..., *shape): (..., m)."""
        return image[..., self.mask.to(image.device)]

    def image(self, y: Tensor, fill: float = 0.0) -> Tensor:
        """y (..., m) laid out on x's grid, with `fill` where x is hidden: (..., *shape)."""
        image = y.new_full((*y.shape[:-1], *self.mask.shape), fill)
        image[..., self.mask] = y
        return image

    def condition(self, y):
        """The seen image, with zeros elsewhere, and the mask as one more channel: (B, C + 1, *spatial); (B, d) for x of shape (d,)."""
        image = self.image(y)
        if len(self.shape) == 1:
            return image
        return torch.cat([image, self.mask[:1].to(image.dtype).expand(len(y), 1, *self.shape[1:])], 1)

    def picture(self, y: Tensor) -> Tensor:
        """The seen image, NaN elsewhere, (B, *shape)."""
        return self.image(y, math.nan)

    def check_y(self, y):
        if isinstance(y, Tensor) and self.y_shape != self.shape and y.shape[-len(self.shape) :] == self.shape:
            raise ValueError(
                f"y must have shape (B, {self.y_shape[0]}), the seen elements, got {tuple(y.shape)}: take them with problem.observed(y)"
            )
        return super().check_y(y)

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "Inpainting":
        """Rebuild from `config` and the saved mask."""
        return cls(config["shape"], weights["mask"], config["noise_std"])
