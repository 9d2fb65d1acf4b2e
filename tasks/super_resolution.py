"""Super-resolution: a small image, every pixel of which is a weighted mean of the large one."""

from functools import partial

import torch
from torch import Tensor, nn

from rtb_inverse.checks import check_choice, check_count
from rtb_inverse.guidance import DENSE_LIMIT
from tasks.deblurring import convolution
from tasks.linear import LinearTask, Physics, image_shape


def shrinking(n: int, factor: int) -> Tensor:
    """The matrix (n / factor, n) that makes a line of n pixels shorter: each row a window of weights that sum to 1, those of the
    border renormalised."""
    lines = torch.eye(n, dtype=torch.float64)[:, None, None].expand(n, 1, factor, n)  # constant along the other axis
    return nn.functional.interpolate(lines, (1, n // factor), mode="bicubic", antialias=True)[:, 0, 0].T.float().contiguous()


class Shrink(nn.Module):
    """R x C^T, with one matrix for the rows and one for the columns: (M, C, H, W) to (M, C, H / factor, W / factor)."""

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: Tensor, columns: Tensor):
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows.to(x.dtype) @ x @ self.columns.to(x.dtype).T


class Blocks(nn.Module):
    """The means of blocks of factor x factor pixels: (M, C, H, W) to (M, C, H / factor, W / factor)."""

    def __init__(self, shape: torch.Size, factor: int):
        super().__init__()
        self.factor = factor
        self.means = convolution(torch.full((factor, factor), 1 / factor**2), "valid", shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.means(x)[..., :: self.factor, :: self.factor]


def matlabs(shape, factor: int) -> Physics:
    from deepinv.physics import DownsamplingMatlab

    if 2 * factor > min(shape[1:]):
        raise ValueError(f"factor must be at most half of the sides of x, {shape[1]} and {shape[2]}, for method 'matlab', got {factor}")
    return Physics(partial(DownsamplingMatlab, factor), shape, DENSE_LIMIT)


class SuperResolution(LinearTask):
    """y = x made smaller + noise_std n, (B, C, H / factor, W / factor).

    Args:
        shape: of x, (C, H, W).
        factor: by which both sides shrink; divides both.
        method: "bicubic" and "matlab", Keys' kernel (a = -1/2) stretched by the factor, which keeps out frequencies that the small image
            cannot hold; they differ at the borders only, where "bicubic" takes the weights that fall into the image and makes their sum 1,
            as Pillow and torch, and "matlab" continues the image by its mirror image, as Matlab and deepinv (both sides of x are then
            2 factor at least). "area", the mean of each block of factor x factor pixels.
        noise_std: standard deviation of the noise, > 0, in the units of x (whose range is the prior's own, usually [-1, 1]).

    Raises:
        ValueError: a factor that does not divide H and W, or is below 2; another method; a shape that is not (C, H, W); noise_std <= 0.
    """

    def __init__(self, shape, factor: int = 4, method: str = "bicubic", noise_std: float = 0.05):
        shape = image_shape(shape)
        if any(n % check_count("factor", factor, 2) for n in shape[1:]):
            raise ValueError(f"factor must divide the sides of x, {shape[1]} and {shape[2]}, got {factor}")
        match check_choice("method", method, ("bicubic", "matlab", "area")):
            case "bicubic":
                operator: nn.Module = Shrink(*(shrinking(n, factor) for n in shape[1:]))
            case "matlab":
                operator = matlabs(shape, factor)
            case _:
                operator = Blocks(shape, factor)
        super().__init__(operator, shape, noise_std, factor=factor, method=method)
