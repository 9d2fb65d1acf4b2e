"""What every way of getting samples ends in."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from rtb_inverse.checks import check_count, check_finite
from rtb_inverse.randomness import uniform


@dataclass(repr=False)
class Particles:
    """Weighted draws.

    A log-weight of -inf is the weight 0, a draw that can never be taken. Where all draws of an observation have it, `log_z` is -inf, `ess`
    0 and `log_z_error` inf, and what needs a draw (`weights`, `mean`, `std`, `resample`) raises ValueError.

    Attributes:
        x: (N, B, *shape), N draws for each of B observations, in data space.
        log_w: (N, B), log weights: log p(path, y) - log q(path | y) where the draws were weighted, 0 where they were not.
        info: what the method says about itself, by name: numbers, or tensors (B,). The corrections say `evaluations` (see
            `rtb_inverse.corrections`); `log_z_error`, where a method gives it, is the property's value.

    Raises:
        ValueError: x that is not finite, log_w that is not (N, B), or NaN or +inf somewhere.
    """

    x: Tensor
    log_w: Tensor
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.log_w.ndim != 2 or self.log_w.numel() == 0 or self.log_w.shape != self.x.shape[:2]:
            raise ValueError(
                f"log_w must have shape (N, B), N and B at least 1, as x (N, B, *shape) has; got {tuple(self.log_w.shape)} and "
                f"{tuple(self.x.shape)}"
            )
        check_finite("x", self.x)
        check_below_infinity("log_w", self.log_w)

    def __repr__(self) -> str:
        (n, b), shape = self.log_w.shape, tuple(self.x.shape[2:])
        return f"Particles({n} draws of shape {shape} for each of {b} observations, ESS {float(self.ess.mean()):.1f})"

    @property
    def weights(self) -> Tensor:
        """Normalised over N: (N, B)."""
        return check_possible("log_w", self.log_w).softmax(0)

    @property
    def ess(self) -> Tensor:
        """Kish's effective sample size, (B,), between 1 and N."""
        total = self.log_w.logsumexp(0)
        return torch.where(total.isneginf(), 0.0, (2 * total - (2 * self.log_w).logsumexp(0)).exp())

    @property
    def log_z(self) -> Tensor:
        """log of the mean weight, (B,): estimates log p(y) where the weights are path weights."""
        return self.log_w.logsumexp(0) - math.log(len(self.log_w))

    @property
    def log_z_error(self) -> Tensor:
        """Standard error of `log_z`, (B,): the method's own where `info` has one, else by the delta method. Too small itself where the ESS
        is a handful; inf for a single draw, which cannot know it."""
        if "log_z_error" in self.info:
            return self.info["log_z_error"]
        return delta_error(self.ess, len(self.log_w))

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
        n = len(self.log_w) if n is None else check_count("n", n)
        index = systematic(self.log_w, n, generator)
        B = index.shape[1]
        x = self.x[index, torch.arange(B, device=self.x.device)]
        return Particles(x, x.new_zeros((n, B)))


def delta_error(ess: Tensor, n: int) -> Tensor:
    """Standard error of the log of the mean of n weights, (B,), from their effective sample size: sqrt(1 / ESS - 1 / n)."""
    return torch.full_like(ess, torch.inf) if n == 1 else (1 / ess - 1 / n).clamp_min(0).sqrt()


def systematic(log_w: Tensor, n: int, generator: Generator | None = None) -> Tensor:
    """Indices (n, B) of a systematic resampling by log-weights (N, B), in random order; never one of weight 0."""
    B = check_possible("log_w", log_w).shape[1]
    cumulative = log_w.double().softmax(0).cumsum(0).T.contiguous()
    u = (torch.arange(n, device=log_w.device) + uniform((B, 1), log_w, generator, torch.float64)) / n
    total = cumulative[:, -1:].contiguous()
    last = torch.searchsorted(cumulative, total)  # of a weight above 0
    index = torch.searchsorted(cumulative, u * total, right=True).minimum(last)
    return index.gather(1, uniform((B, n), log_w, generator, torch.float32).argsort(1)).T


def check_below_infinity(name: str, value: Tensor) -> Tensor:
    """Return log-weights (or log-likelihoods) if none is NaN or +infinity; raise ValueError otherwise. -infinity is the weight 0."""
    bad = value.isnan() | value.isposinf()
    if bad.any():
        raise ValueError(f"{name} must be below infinity and not NaN, got NaN or +infinity in {int(bad.sum())} of {bad.numel()} elements")
    return value


def check_possible(name: str, log_w: Tensor) -> Tensor:
    """Return log-weights (N, B) if those of every observation have one above -infinity; raise ValueError otherwise."""
    check_below_infinity(name, log_w)
    dead = log_w.isneginf().all(0).nonzero().flatten().tolist()
    if dead:
        raise ValueError(
            f"{name} must be above -infinity for one draw of every observation at least, got -infinity alone for observations {dead[:10]} "
            f"of {log_w.shape[1]}: no draw is possible there; expected more draws, or a sampler that reaches what y allows"
        )
    return log_w
