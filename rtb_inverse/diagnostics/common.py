"""What the diagnostics share: an estimate with its standard error, and what they ask of their arguments."""

import math
from dataclasses import dataclass

from torch import Generator, Tensor

from rtb_inverse.checks import check_tensor
from rtb_inverse.randomness import standard_normal


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error: NaN for a single value, and where a value is infinite."""

    value: float
    error: float

    @staticmethod
    def of(values: Tensor) -> "Estimate":
        """Mean of independent values and its standard error."""
        values = values.double().flatten()
        error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return Estimate(float(values.mean()), error)

    def to_dict(self) -> dict[str, float | None]:
        """For JSON: None where a number is not finite."""
        return {name: number if math.isfinite(number) else None for name, number in (("value", self.value), ("error", self.error))}

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.2g}"


def check_draws(name: str, draws: Tensor, least: int = 1) -> Tensor:
    """`draws` if it is finite, of shape (N, B, *shape) and N is at least `least`."""
    if check_tensor(name, draws).ndim < 2:
        raise ValueError(f"{name} must have shape (N, B, *shape), got {tuple(draws.shape)}")
    if len(draws) < least:
        raise ValueError(f"{name} must have shape (N, B, *shape) with at least {least} draws, got {tuple(draws.shape)}")
    return draws


def check_pair(draws: Tensor, truth: Tensor, least: int = 1, observations: int = 1) -> None:
    """Draws (N, B, *shape) and a truth (B, *shape) that match, with N and B at least so many."""
    check_draws("draws", draws, least)
    if check_tensor("truth", truth).shape != draws.shape[1:]:
        raise ValueError(f"truth must have the shape (B, *shape) of the draws, {tuple(draws.shape[1:])}, got {tuple(truth.shape)}")
    check_observations("draws", draws.shape[1], observations)


def check_observations(name: str, B: int, least: int) -> None:
    if B < least:
        raise ValueError(f"{name} must hold at least {least} observations for a test over observations, got B = {B}")


def check_alike(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if check_tensor(name, x).shape != check_tensor(other, y).shape:
        raise ValueError(f"{name} and {other} must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}")


def check_log_w(log_w: Tensor) -> Tensor:
    """`log_w` if it holds neither NaN nor +infinity; -infinity is the weight 0."""
    if not isinstance(log_w, Tensor) or not log_w.is_floating_point():
        raise TypeError(f"log_w must be a floating-point torch.Tensor, got {getattr(log_w, 'dtype', type(log_w).__name__)}")
    if log_w.ndim == 0 or log_w.numel() == 0:
        raise ValueError(f"log_w must have shape (N, B) with at least one draw and one observation, got {tuple(log_w.shape)}")
    bad = log_w.isnan() | log_w.isposinf()
    if bad.any():
        raise ValueError(f"log_w must be below infinity and not NaN, got NaN or +infinity in {int(bad.sum())} of {bad.numel()} elements")
    return log_w


def random_directions(x: Tensor, n: int, generator: Generator | None) -> Tensor:
    """n random unit vectors of the last axis of x, as columns."""
    theta = standard_normal(x, generator, (x.shape[-1], n))
    return theta / theta.norm(dim=0)
