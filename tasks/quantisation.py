r"""Quantisation to a few bits: y is the bin that x + std n falls into.

    p(y = k | x) = Phi((e_{k+1} - x) / std) - Phi((e_k - x) / std),   e_0 = -inf < e_1 < ... < e_{L-1} < e_L = inf,

Phi the normal distribution function: L = 2^bits bins, of equal width on the range [low, high], the outer two open. If x is Gaussian
itself, its variance adds to std^2.
"""

import math
from numbers import Real

import torch
from torch import Tensor, nn

from rtb_inverse.checks import check_count, check_tensor, one_number
from rtb_inverse.noise import QuantisedNoise
from rtb_inverse.noise_distributions import QuantisedNormal
from rtb_inverse.problems import InverseProblem


def check_limits(limits) -> tuple[float, float]:
    """(low, high) as floats, if low < high are finite; raise ValueError otherwise."""
    pair = isinstance(limits, (tuple, list)) and len(limits) == 2 and all(isinstance(limit, Real) for limit in limits)
    if not pair or not -math.inf < limits[0] < limits[1] < math.inf:
        raise ValueError(f"limits must be two finite numbers low < high, got {limits!r}")
    return float(limits[0]), float(limits[1])


class Quantisation(InverseProblem):
    """y = the index, 0 .. 2^bits - 1, of the bin that x + noise_std n falls into, element by element; float, of x's shape.

    Args:
        shape: of x.
        bits: 1 to 16.
        noise_std: standard deviation of the noise before the quantiser, > 0, in the units of x (whose range is the prior's own, usually
            [-1, 1]).
        limits: low < high, where the bins of equal width begin and end; what lies beyond falls into the outer ones.

    Raises:
        ValueError: bits that are no integer in 1 .. 16, noise_std <= 0, limits that are not in order.
    """

    def __init__(self, shape, bits: int = 2, noise_std: float = 0.1, limits: tuple[float, float] = (-1.0, 1.0)):
        if check_count("bits", bits) > 16:
            raise ValueError(f"bits must be at most 16, got {bits}")
        low, high = check_limits(limits)
        edges = torch.linspace(low, high, 2**bits + 1, dtype=torch.float64)[1:-1]
        noise_std = one_number("noise_std", noise_std)
        super().__init__(nn.Identity(), QuantisedNoise(noise_std, edges), linear=True)
        self.low, self.width, self.levels = low, (high - low) / 2**bits, 2**bits
        self.config = {"shape": list(shape), "bits": bits, "noise_std": float(noise_std), "limits": [low, high]}
        self.bind(shape)

    def smoothed(self, mean, y, variance):
        """log int N(x; mean, variance) p(y | x) dx, element by element: that of the bin under a wider Gaussian."""
        std = (self.noise.std.to(mean.dtype) ** 2 + variance).sqrt()
        return QuantisedNormal(mean, std, self.noise.edges.to(mean.dtype)).log_prob(y)

    def condition(self, y):
        """The centres of the bins, in the units of x, (B, *shape)."""
        return self.low + self.width * (y + 0.5)

    def check_y(self, y):
        """y if it is a batch (B, *shape) of bins 0, 1, ..., 2^bits - 1, as integers or floats: as floats."""
        y = check_tensor("y", self._as_floats(y), self.y_shape)
        wrong = (y != y.round()) | (y < 0) | (y >= self.levels)
        if wrong.any():
            raise ValueError(f"y must hold bins 0, 1, ..., {self.levels - 1}, got {float(y[wrong][0]):g}")
        return y

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "Quantisation":
        """Rebuild from `config`."""
        return cls(**config)
