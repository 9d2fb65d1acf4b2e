"""High dynamic range: the sensor clips what is too bright or too dark, y = clip(scale x) + noise_std n."""

import torch
from torch import Tensor

from rtb_inverse.checks import check_positive
from rtb_inverse.problems import GaussianNoise, InverseProblem


class HDR(InverseProblem):
    """y = clip(scale x, low, high) + noise_std n, element by element, of x's shape.

    The likelihood's gradient is 0 where x is clipped: there y says no more than on which side x lies, and a gradient cannot say even
    that. So the guide does not follow the gradient here: it takes the mean and variance of each element (`PointwiseGuidance`).

    Args:
        shape: of x.
        scale: > 0; 2 keeps the inner half of the range [-1, 1].
        limits: low < high, in the units of y.
        noise_std: standard deviation of the noise, > 0, in the units of y.

    Raises:
        ValueError: scale or noise_std <= 0, or limits that are not in order.
    """

    def __init__(self, shape, scale: float = 2.0, limits: tuple[float, float] = (-1.0, 1.0), noise_std: float = 0.1):
        self.scale = check_positive("scale", scale)
        if len(limits) != 2 or not limits[0] < limits[1]:
            raise ValueError(f"limits must be two numbers low < high, got {limits!r}")
        self.limits = float(limits[0]), float(limits[1])
        super().__init__(self.observed, GaussianNoise(noise_std), linear=False)
        self.config = {"shape": list(shape), "scale": self.scale, "limits": list(self.limits), "noise_std": float(noise_std)}
        self.pointwise = True
        self.bind(shape)

    def observed(self, x: Tensor) -> Tensor:
        """clip(scale x), (M, *shape)."""
        return (self.scale * x).clamp(*self.limits)

    def condition(self, y):
        """y / scale, and channels that say where it is clipped: 1 within one noise_std of the upper limit or above, -1 of the lower one or
        below, else 0. (B, 2 C, *spatial); (B, 2 d) for x of shape (d,)."""
        low, high = self.limits
        std = self.noise.std.to(y.dtype)
        clipped = (y > high - std).to(y.dtype) - (y < low + std).to(y.dtype)
        return torch.cat([y / self.scale, clipped], 1)

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "HDR":
        """Rebuild from `config`."""
        return cls(**config)
