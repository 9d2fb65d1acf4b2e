"""What every way of getting samples ends in."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor


@dataclass
class Particles:
    """Weighted draws.

    Attributes:
        x: (N, B, *shape), N draws for each of B observations, in data space.
        log_w: (N, B), log weights: log p(path, y) - log q(path | y) where the draws were weighted, 0 where they were not.
        info: what the method says about itself, by name: numbers, or tensors (B,). `evaluations` is of the posterior's network for each
            draw, scoring included.
    """

    x: Tensor
    log_w: Tensor
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Tensor:
        """Normalised over N: (N, B)."""
        return self.log_w.softmax(0)

    @property
    def ess(self) -> Tensor:
        """Kish's effective sample size, (B,), between 1 and N."""
        return 1 / (self.weights**2).sum(0)

    @property
    def log_z(self) -> Tensor:
        """log of the mean weight, (B,): estimates log p(y) where the weights are path weights."""
        return self.log_w.logsumexp(0) - torch.log(torch.tensor(float(len(self.log_w))))

    @property
    def log_z_error(self) -> Tensor:
        """Standard error of `log_z`, (B,), by the delta method; too small itself where the ESS is a handful."""
        return ((1 / self.ess - 1 / len(self.log_w)).clamp_min(0)).sqrt()

    @property
    def mean(self) -> Tensor:
        """Weighted mean, (B, *shape)."""
        return torch.einsum("nb,nb...->b...", self.weights.to(self.x.dtype), self.x)

    @property
    def std(self) -> Tensor:
        """Weighted standard deviation, (B, *shape)."""
        return torch.einsum("nb,nb...->b...", self.weights.to(self.x.dtype), (self.x - self.mean) ** 2).sqrt()

    def resample(self, n: int | None = None, generator: Generator | None = None) -> "Particles":
        """n unweighted draws (default N) by systematic resampling, in random order, for each observation."""
        n = len(self.log_w) if n is None else n
        index = systematic(self.log_w, n, generator)
        B = index.shape[1]
        x = self.x[index, torch.arange(B, device=self.x.device)]
        return Particles(x, x.new_zeros((n, B)))


def systematic(log_w: Tensor, n: int, generator: Generator | None = None) -> Tensor:
    """Indices (n, B) of a systematic resampling by log-weights (N, B), in random order."""
    N, B = log_w.shape
    cumulative = log_w.double().softmax(0).cumsum(0).T.contiguous()
    options: dict[str, Any] = {"generator": generator, "device": log_w.device}
    u = (torch.arange(n, device=log_w.device) + torch.rand((B, 1), dtype=torch.float64, **options)) / n
    index = torch.searchsorted(cumulative, u * cumulative[:, -1:]).clamp_max(N - 1)
    return index.gather(1, torch.rand((B, n), **options).argsort(1)).T
