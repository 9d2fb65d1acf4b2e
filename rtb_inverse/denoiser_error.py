r"""What is still unknown of x_0 once x_t is seen: the covariance of the denoiser's error,

    C_t = E (x_0 - x0hat(x_t)) (x_0 - x0hat(x_t))^T,      its diagonal r_t^2 element by element.

Measured once, on clean examples. The variances are kept at many times, the correlations at fewer: they change slowly. A correlation
matrix is kept as diag(1 - |F_i|^2) + F F^T, with the leading eigenvectors in F.
"""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from rtb_inverse.randomness import standard_normal
from rtb_inverse.schedules import Schedule, expand, rows

LARGEST = 4096  # elements of an x whose correlations are measured


class DenoiserError(nn.Module):
    """r_t^2 and C_t over time, linear between the times they were measured at.

    Args:
        times: (J,), increasing.
        variance: r_t^2 at these times, (J, *shape).
        factor_times: (I,), increasing; None where the correlations are not known.
        factor: F at these times, (I, d, rank), d the number of elements of x.
    """

    times: Tensor
    variance: Tensor
    factor_times: Tensor | None
    factor: Tensor | None

    def __init__(self, times: Tensor, variance: Tensor, factor_times: Tensor | None = None, factor: Tensor | None = None):
        super().__init__()
        tables = {"times": times, "variance": variance, "factor_times": factor_times, "factor": factor}
        for name, value in tables.items():
            self.register_buffer(name, value if value is None or name == "factor" else value.double(), persistent=False)

    @classmethod
    @torch.no_grad()
    def measure(
        cls, schedule: Schedule, denoise: Callable, x_0: Tensor, event_dim: int, knots: int = 64, factor_knots: int = 16,
        rank: int = 64, generator: Generator | None = None,
    ) -> "DenoiserError":  # fmt: skip
        """Measure on clean examples x_0 (M, *batch, *shape), shape the last `event_dim` axes.

        Args:
            knots: J. factor_knots: about I; 0 for variances only. rank: at most so many eigenvectors.
        """
        times = schedule.times(knots)[:-1].flip(0)
        chosen = torch.linspace(0, len(times) - 1, min(factor_knots, len(times))).round().long().tolist()
        variance, factors = [], []
        for j, t in enumerate(times):
            noise = standard_normal(x_0, generator)
            error = (denoise(schedule.add_noise(x_0, noise, t), t) - x_0).double()
            error = error.reshape(-1, *x_0.shape[x_0.ndim - event_dim :])
            variance.append(error.square().mean(0))
            if j in chosen and variance[0].numel() <= LARGEST:
                factors.append(leading_correlations(error.flatten(1), rank))
        known = {"factor_times": times[chosen].to(x_0.device), "factor": torch.stack(factors)} if factors else {}
        return cls(times.to(x_0.device), torch.stack(variance), **known)

    def forward(self, t: Tensor) -> Tensor:
        """r_t^2, (*t.shape, *shape), float64."""
        low, high, weight = between(self.times, t.to(self.times.device))
        weight = expand(weight, self.variance.new_empty(weight.shape + self.variance.shape[1:]))
        return torch.lerp(rows(self.variance, low), rows(self.variance, high), weight)

    def covariance(self, t: Tensor) -> Tensor | None:
        """C_t at one time t, (d, d), float64; None where the correlations are not known."""
        if self.factor is None:
            return None
        low, high, weight = between(self.factor_times, t.to(self.factor_times.device))
        first, second = rows(self.factor, low).double(), rows(self.factor, high).double()
        correlation = torch.lerp(first @ first.T, second @ second.T, weight)
        correlation.diagonal().fill_(1)
        std = self(t).flatten().sqrt()
        return std[:, None] * correlation * std

    def tensors(self) -> dict[str, Tensor]:
        """For a safetensors file; `DenoiserError(**tensors)` reads them."""
        return dict(self.named_buffers())


def between(knots: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The knots around t, their indices, and the weight of the upper one; t beyond the ends is taken at the end."""
    position = t.double().clamp(knots[0], knots[-1])
    high = torch.searchsorted(knots, position).clamp(1, len(knots) - 1)
    low = high - 1
    below, above = rows(knots, low), rows(knots, high)
    return low, high, (position - below) / (above - below)


def leading_correlations(error: Tensor, rank: int) -> Tensor:
    """F (d, rank) with F F^T the best of that rank to the correlations (about zero) of `error` (M, d)."""
    scaled = error / error.square().sum(0).sqrt().clamp_min(1e-30)
    eigenvalues, vectors = torch.linalg.eigh(scaled.T @ scaled)
    return (vectors * eigenvalues.clamp_min(0).sqrt())[:, -rank:].float()
