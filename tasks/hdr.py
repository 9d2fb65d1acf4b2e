r"""High dynamic range: the sensor clips what is too bright or too dark, y = clip(scale x, low, high) + std n.

The likelihood's gradient is 0 where x is clipped: there y says on which side x lies, if that, and a gradient cannot say even that. So the
guide does not follow the gradient: it takes each element's mean and variance under x ~ N(m, v), a mixture of three cases,

    log int N(x; m, v) p(y | x) dx = log ( N(y; low, std^2) Phi(a) + N(y; high, std^2) Phi(-b)
                                         + N(y; scale m, std^2 + scale^2 v) (Phi(b') - Phi(a')) ),

a and b the ends of the unclipped range of x, standardised under N(m, v); a' and b' the same once y is seen unclipped. (`ElementGuidance`)
"""

import math

import torch
from torch import Tensor

from rtb_inverse.checks import check_positive, one_number
from rtb_inverse.noise_distributions import log_interval
from rtb_inverse.problems import GaussianNoise, InverseProblem
from tasks.quantisation import check_limits


def log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1)."""
    return -0.5 * z**2 - 0.5 * math.log(2 * math.pi)


class HDR(InverseProblem):
    """y = clip(scale x, low, high) + noise_std n, element by element, of x's shape.

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
        self.limits = check_limits(limits)
        noise_std = one_number("noise_std", noise_std)
        super().__init__(self.observed, GaussianNoise(noise_std), linear=False)
        self.y_range = self.limits
        self.config = {"shape": list(shape), "scale": self.scale, "limits": list(self.limits), "noise_std": float(noise_std)}
        self.bind(shape)

    def observed(self, x: Tensor) -> Tensor:
        """clip(scale x), (M, *shape)."""
        return (self.scale * x).clamp(*self.limits)

    def smoothed(self, mean, y, variance, level=1.0):
        """log int N(x; mean, variance) p(y | x) dx, element by element, by the three cases above; of noise of `level` times noise_std."""
        (low, high), scale, std = self.limits, self.scale, level * self.noise.std.to(mean.dtype)
        spread = variance.sqrt()
        total = std**2 + scale**2 * variance
        seen, left = mean + scale * variance / total * (y - scale * mean), (variance / total).sqrt() * std  # of x, if not clipped
        cases = [
            log_normal((y - low) / std) - std.log() + torch.special.log_ndtr((low / scale - mean) / spread),
            log_normal((y - high) / std) - std.log() + torch.special.log_ndtr((mean - high / scale) / spread),
            log_normal((y - scale * mean) / total.sqrt()) - total.log() / 2
            + log_interval((low / scale - seen) / left, (high / scale - seen) / left),
        ]  # fmt: skip
        return torch.stack(torch.broadcast_tensors(*cases)).logsumexp(0)

    def condition(self, y):
        """y / scale, and channels that say where it is clipped: 1 within one noise_std of the upper limit or above, -1 of the lower one or
        below, else 0. (B, 2 C, *spatial); (B, 2 d) for x of shape (d,)."""
        low, high = self.limits
        std = self.condition_level * self.noise.std.to(y.dtype)
        clipped = (y > high - std).to(y.dtype) - (y < low + std).to(y.dtype)
        return torch.cat([y / self.scale, clipped], 1)

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "HDR":
        """Rebuild from `config`."""
        return cls(**config)
