r"""One measurement model for many lenses: the lens v of each observation is drawn from a range, and told with the image,

    y = (P B L_v (x - sky) + noise_std n,  v),      n ~ N(0, I),      v = (einstein_radius, axis_ratio, angle, g_1, g_2) uniform.

p(y | x) is the density of the image behind that lens, p(image | x, v). The lens's own density, the same for all x, is no part of it: so
Z(y) is the evidence p(image | v), as it is of `Lensing` with the one lens.
"""

import math

import torch
from torch import Generator, Tensor, nn

from rtb_inverse.checks import check_finite, check_tensor
from rtb_inverse.problems import InverseProblem
from rtb_inverse.randomness import uniform
from tasks.lensing import Lensing, check_pair, corners, detector, shoot

AT_ONCE = 2**23  # rays that are followed together
FAINT = 0.05  # of the largest A_v^T 1: a pixel of the source of which less light arrives is hardly seen


def check_order(name: str, low: float, high: float) -> None:
    if low >= high:
        raise ValueError(f"{name} must be a range (low, high) with low below high, got {(low, high)!r}")


class LensRange(nn.Module):
    """v, uniform between low and high, (5,) each."""

    low: Tensor
    high: Tensor

    def __init__(self, ranges: dict[str, tuple[float, float]]):
        super().__init__()
        for name, (low, high) in ranges.items():
            check_order(name, low, high)
        self.names = list(ranges)
        self.register_buffer("low", torch.tensor([low for low, _ in ranges.values()], dtype=torch.float64))
        self.register_buffer("high", torch.tensor([high for _, high in ranges.values()], dtype=torch.float64))

    def share(self, v: Tensor) -> Tensor:
        """Where between low (0) and high (1) each parameter is."""
        return ((v - self.low) / (self.high - self.low)).to(v.dtype)

    def sample_lens(self, shape, like: Tensor, generator: Generator | None = None) -> Tensor:
        """v, (*shape, 5), in the dtype of `like`."""
        share = uniform((*shape, len(self.low)), like, generator)
        return self.low.to(like) + share * (self.high - self.low).to(like)


class LensingFamily(InverseProblem):
    """`Lensing` behind lenses that vary: one posterior serves them all. y is the vector of the m m pixels of an image and its lens v,
    (B, m m + 5); `observation` makes it. Without an observation, A(x) is the image behind the lens of `problem`.

    A posterior is guided by the lens of each observation; what it leaves of the variances is taken on average over the lenses.

    Args:
        problem: says all but v, of which it has the centre only.
        einstein_radius: range (low, high) [arcsec], low above 0. axis_ratio: range within (0, 1]. angle: range [rad], all directions by
            default. shear: range of either component, within (-0.7, 0.7).

    Raises:
        TypeError: a problem that is no `Lensing`. ValueError: a range that is none.
    """

    operator: Lensing
    noise: LensRange
    PB: Tensor
    theta: Tensor

    def __init__(
        self, problem: Lensing, einstein_radius=(0.8, 1.2), axis_ratio=(0.6, 0.95), angle=(0.0, math.pi), shear=(-0.05, 0.05)
    ):  # fmt: skip
        if not isinstance(problem, Lensing):
            raise TypeError(f"problem must be a Lensing, got {type(problem).__name__}")
        given = {"einstein_radius": einstein_radius, "axis_ratio": axis_ratio, "angle": angle, "shear": shear}
        ranges = {name: check_pair(name, value) for name, value in given.items()}
        for name, low, high in (("einstein_radius", 0.0, math.inf), ("axis_ratio", 0.0, 1.0), ("shear", -0.7, 0.7)):
            if not low < ranges[name][0] or ranges[name][1] > high:
                raise ValueError(f"{name} must be a range within ({low:g}, {high:g}], got {ranges[name]!r}")
            check_order(name, *ranges[name])
        named = {**ranges, "g_1": ranges["shear"], "g_2": ranges["shear"]}
        super().__init__(problem, LensRange({name: value for name, value in named.items() if name != "shear"}), problem.shape)
        self.config = {"problem": problem.config, **ranges}
        of = problem.config
        PB, theta = detector(of["pixels"], of["supersample"], of["image_fov"], of["psf_fwhm"])
        self.register_buffer("PB", torch.from_numpy(PB.toarray()).float(), persistent=False)
        self.register_buffer("theta", theta, persistent=False)

    @classmethod
    def from_config(cls, config, weights):
        held = {name.removeprefix("operator."): value for name, value in weights.items() if name.startswith("operator.")}
        return cls(Lensing.from_config(config["problem"], held), **{name: value for name, value in config.items() if name != "problem"})

    def _probe(self, shape, examples=None):
        super()._probe(shape, examples)
        self.y_shape = torch.Size([self.y_shape.numel() + len(self.noise.low)])

    def observation(self, image: Tensor, v) -> Tensor:
        """y (B, m m + 5) of images (B, 1, m, m) and their lens v, (5,) or (B, 5); where all directions are in range, at any angle.

        Raises:
            ValueError: an image of another shape; a lens out of range.
        """
        image = self.operator.check_y(image).to(self.noise.low.device)
        v, k = torch.as_tensor(v).to(image).expand(len(image), -1).clone(), self.noise.names.index("angle")
        low, high = self.noise.low[k].to(v), self.noise.high[k].to(v)
        if high - low > math.pi - 1e-6:
            v[:, k] = low + (v[:, k] - low) % math.pi  # an ellipse turned by half is the same
        return self.check_y(self._join(image, v))

    def _join(self, image: Tensor, v: Tensor) -> Tensor:
        return torch.cat([image.flatten(-3), v], -1)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Images (*batch, 1, m, m) and their lenses (*batch, 5) from y (*batch, m m + 5)."""
        image, v = y.split([self.operator.y_shape.numel(), len(self.noise.low)], -1)
        return image.reshape(*y.shape[:-1], *self.operator.y_shape), v

    def corners(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """L_v for lenses v (B, 5): for the rays of each, the four pixels between which it lies and their weights, (4, B, R)."""
        of = self.operator.config
        b, q, angle, g1, g2 = v.double()[..., None].unbind(1)
        index, weight = corners(shoot(self.theta, b, q, angle, of["centre"], (g1, g2)), self.shape[-1], of["source_fov"])
        return index, weight.to(v.dtype)

    def seen(self, x: Tensor, v: Tensor) -> Tensor:
        """P B L_v (x - sky): x (*batch, 1, n, n) behind lenses v (*batch, 5) or (B, 5): (*batch, 1, m, m)."""
        batch = torch.broadcast_shapes(x.shape[:-3], v.shape[:-1])
        v = v.expand(*batch[len(batch) - v.ndim + 1 :], -1).reshape(-1, v.shape[-1])
        light = (x - self.operator.operator.sky).expand(*batch, *self.shape).reshape(-1, len(v), self.shape.numel())
        (index, weight), PB = self.corners(v), self.PB.to(x.dtype)
        images = []
        for part in light.split(max(1, AT_ONCE // weight.numel())):
            rays = sum(w * part.gather(2, i.expand(len(part), -1, -1)) for i, w in zip(index, weight, strict=True))
            images.append(PB @ rays.unflatten(2, (PB.shape[1], -1)) @ PB.T)
        return torch.cat(images).reshape(*batch, *self.operator.y_shape)

    def simulate(self, x, generator=None):
        v = self.noise.sample_lens(x.shape[: x.ndim - len(self.shape)], x, generator)
        return self._join(self.operator.noise.sample(check_finite("operator's output", self.seen(x, v)), generator), v)

    def log_likelihood(self, x, y):
        image, v = self.split(y)
        return self.operator.noise.log_prob(self.seen(x, v), image, len(self.operator.y_shape))

    def residual(self, x, y):
        image, v = self.split(y)
        clean = self.seen(x, v)
        return self.operator.noise.whiten(clean, image - clean)

    def noise_variance(self, y):
        return self.operator.noise_variance(y)

    def check_y(self, y):
        share = self.noise.share(check_tensor("y", y, self.y_shape)[:, -len(self.noise.low) :])
        bad = (share < -1e-4) | (share > 1 + 1e-4)  # rounding
        if bad.any():
            b, k = bad.nonzero()[0].tolist()
            low, high = float(self.noise.low[k]), float(self.noise.high[k])
            value = float(y[b, k - len(self.noise.low)])
            raise ValueError(f"y must end in a lens (see `observation`): its {self.noise.names[k]} in [{low:g}, {high:g}], got {value:.6g}")
        return y

    def condition(self, y):
        """On the source's grid, (B, 8, n, n): the mean brightness of the image where it shows each pixel, sky + A_v^T image / A_v^T 1; how
        much light of the pixel arrives, A_v^T 1, relative to the largest; and the lens: radius, axis ratio and shears from -1 to 1, cosine
        and sine of twice the angle."""
        image, v = self.split(y)
        pull = torch.func.vjp(lambda x: self.seen(x, v), y.new_zeros((len(y), *self.shape)))[1]  # type: ignore[misc]  # three only with has_aux
        back, arrives = pull(image)[0], pull(torch.ones_like(image))[0]
        most = arrives.amax((1, 2, 3), keepdim=True)
        radius, ratio, _, g1, g2 = (2 * self.noise.share(v) - 1).unbind(-1)
        told = torch.stack([radius, ratio, g1, g2, (2 * v[:, 2]).cos(), (2 * v[:, 2]).sin()], 1)
        told = told[..., None, None].expand(-1, -1, *self.shape[1:])
        return torch.cat([self.operator.operator.sky + back / (arrives + FAINT * most), arrives / most, told], 1)

    def several(self, v: Tensor, rays: int = 601) -> Tensor:
        """Which pixels of the source have more than one image behind lenses v (B, 5), (B, n, n): those with a mirrored one, where
        det(d beta / d theta) < 0, which a lens makes of nothing that it shows once. By rays x rays of them over the image."""
        of, n = self.operator.config, self.shape[-1]
        axis = of["image_fov"] * torch.linspace(-0.5, 0.5, rays, dtype=torch.float64, device=v.device)
        b, q, angle, *shear = v.double()[..., None].unbind(1)
        beta = (
            shoot(torch.cartesian_prod(axis, axis).flip(1), b, q, angle, of["centre"], shear).unflatten(1, (rays, rays)) / of["source_fov"]
        )
        by_row, by_column = torch.gradient(beta, dim=(1, 2))
        mirrored = (by_column[..., 0] * by_row[..., 1] < by_column[..., 1] * by_row[..., 0]) & (beta.abs().amax(-1) < 0.5)
        pixel = ((beta[mirrored] + 0.5) * n).long()
        found = torch.zeros((len(v), n, n), dtype=torch.bool, device=v.device)
        found[mirrored.nonzero()[:, 0], pixel[:, 1], pixel[:, 0]] = True
        return found

    def picture(self, y: Tensor) -> Tensor:
        """The images, (B, 1, m, m)."""
        return self.split(y)[0]
