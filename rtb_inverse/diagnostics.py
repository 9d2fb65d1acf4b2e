r"""How good draws are: pure functions of tensors, each with a standard error where it is an average over observations.

N draws for each of B observations: draws (N, B, *shape), log-weights log w = log p(tau) + beta log p(y | x_0) - log q(tau | y), (N, B).
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error (NaN for a single value)."""

    value: float
    error: float

    @staticmethod
    def of(values: Tensor) -> "Estimate":
        """Mean of independent values and its standard error."""
        values = values.double().flatten()
        error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return Estimate(float(values.mean()), error)

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.2g}"


def elbo(log_w: Tensor) -> Tensor:
    """E_q log w, a lower bound of log Z(y): (N, B) weights of on-policy paths to (B,)."""
    return log_w.mean(0)


def eubo(log_w: Tensor) -> Tensor:
    """E_p(tau | y) log w, an upper bound of log Z(y): (N, B) weights of paths of the posterior itself, such as a prior roll-out for the y
    that was simulated from its end; to (B,)."""
    return log_w.mean(0)


def effective_sample_size(log_w: Tensor) -> Tensor:
    """Kish's effective sample size over N, in [1, N]: (B,)."""
    return (2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp()


def log_mean_weight(log_w: Tensor) -> Tensor:
    """Importance-sampled log Z(y): (N, B) to (B,)."""
    return log_w.logsumexp(0) - math.log(len(log_w))


def interval_coverage(draws: Tensor, truth: Tensor, level: float) -> Tensor:
    """Share of elements of the truth (B, *shape) inside the central interval of that level of the draws (N, B, *shape): (B,).
    With N draws, the interval between order statistics is exact for its own level, floor-rounded to a multiple of 2 / (N + 1)."""
    n = len(draws)
    skip = max(1, math.floor((1 - level) / 2 * (n + 1) + 1e-9))
    ordered = draws.sort(0).values
    inside = (truth >= ordered[skip - 1]) & (truth <= ordered[n - skip])
    return inside.flatten(1).double().mean(1)


def interval_level(n: int, level: float) -> float:
    """The level that `interval_coverage` truly has with n draws."""
    return 1 - 2 * max(1, math.floor((1 - level) / 2 * (n + 1) + 1e-9)) / (n + 1)


def psnr(estimate: Tensor, truth: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of (B, *shape) against the truth: (B,)."""
    error = (estimate - truth).square().flatten(1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 128, generator: Generator | None = None) -> Tensor:
    """Sliced 2-Wasserstein distance between two sets of equally many draws, x and y (N, *shape) or (N, B, *shape) with a common
    batch; root mean square over random directions: a number, or (B,).

    Args:
        directions: how many random directions to project on.
    """
    if x.shape != y.shape:
        raise ValueError(f"x and y must have the same shape (N, ...), got {tuple(x.shape)} and {tuple(y.shape)}")
    batched = x.ndim > 2
    x, y = (v.reshape(len(v), v.shape[1] if batched else 1, -1) for v in (x, y))
    theta = torch.randn((x.shape[-1], directions), generator=generator, device=x.device, dtype=x.dtype)
    theta = theta / theta.norm(dim=0)
    distance = ((x @ theta).sort(0).values - (y @ theta).sort(0).values).square().mean((0, 2)).sqrt()
    return distance if batched else distance[0]


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half of the absolute differences of two vectors of probabilities, (..., J)."""
    return (p - q).abs().sum(-1) / 2
