r"""Quantisation to a few bits: y is the bin that x + std n falls into.

    p(y = k | x) = Phi((e_{k+1} - x) / std) - Phi((e_k - x) / std),   e_0 = -inf < e_1 < ... < e_{L-1} < e_L = inf,

Phi the normal distribution function: L = 2^bits bins, of equal width on the range [low, high], the outer two open.
"""

import math

import torch
from torch import Generator, Tensor, nn

from rtb_inverse.checks import check_count, check_positive, check_tensor
from rtb_inverse.problems import InverseProblem


class QuantisationNoise(nn.Module):
    """The index 0 .. levels - 1 of the bin that A(x) + std n falls into.

    Args:
        std: of the noise before the quantiser, > 0.
        levels: L, at least 2. low, high: where the bins of equal width begin and end.
    """

    def __init__(self, std: float, levels: int, low: float = -1.0, high: float = 1.0):
        super().__init__()
        self.std, self.levels, self.low = check_positive("noise_std", std), check_count("levels", levels, 2), low
        self.width = (high - low) / levels

    def sample(self, clean: Tensor, generator: Generator | None = None) -> Tensor:
        """y given A(x)."""
        noise = torch.randn(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
        return ((clean + self.std * noise - self.low) / self.width).floor().clamp(0, self.levels - 1)

    def log_prob(self, clean: Tensor, y: Tensor, event_dim: int) -> Tensor:
        """log p(y | A(x)), summed over the last `event_dim` axes; clean and y broadcast."""
        lower = (self.low + self.width * y - clean) / self.std
        upper = lower + self.width / self.std
        # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): looked at from the side where neither is close to 1
        outermost = (y == 0) | (y == self.levels - 1)
        flip = torch.where(outermost, y > 0, lower + upper > 0)
        a, b = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
        log_upper = torch.special.log_ndtr(b)
        gap = torch.where(outermost, -1.0, torch.special.log_ndtr(a) - log_upper)
        log_p = log_upper + torch.where(outermost, 0.0, (-torch.expm1(gap)).log())
        return log_p.flatten(log_p.ndim - event_dim).sum(-1) if event_dim else log_p


class Quantisation(InverseProblem):
    """y = the index, 0 .. 2^bits - 1, of the bin that x + noise_std n falls into, element by element; float, of x's shape.

    Args:
        shape: of x.
        bits: 1 to 16.
        noise_std: standard deviation of the noise before the quantiser, > 0, in the units of x.
        limits: low < high, where the bins of equal width begin and end; what lies beyond falls into the outer ones.

    Raises:
        ValueError: bits that are no integer in 1 .. 16, noise_std <= 0, limits that are not in order.
    """

    def __init__(self, shape, bits: int = 2, noise_std: float = 0.1, limits: tuple[float, float] = (-1.0, 1.0)):
        if check_count("bits", bits) > 16:
            raise ValueError(f"bits must be at most 16, got {bits}")
        if len(limits) != 2 or not -math.inf < limits[0] < limits[1] < math.inf:
            raise ValueError(f"limits must be two numbers low < high, got {limits!r}")
        super().__init__(nn.Identity(), QuantisationNoise(noise_std, 2**bits, *limits), linear=True)
        self.config = {"shape": list(shape), "bits": bits, "noise_std": float(noise_std), "limits": [float(c) for c in limits]}
        self.pointwise = True
        self.bind(shape)

    def condition(self, y):
        """The centres of the bins, in the units of x."""
        return self.noise.low + self.noise.width * (y + 0.5)

    def check_y(self, y):
        y = check_tensor("y", y.float() if isinstance(y, Tensor) and not y.is_complex() else y, self.y_shape)
        wrong = (y != y.round()) | (y < 0) | (y >= self.noise.levels)
        if wrong.any():
            raise ValueError(f"y must hold bins 0, 1, ..., {self.noise.levels - 1}, got {float(y[wrong][0]):g}")
        return y

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "Quantisation":
        """Rebuild from `config`."""
        return cls(**config)
