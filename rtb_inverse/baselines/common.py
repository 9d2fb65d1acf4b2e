"""What the rival methods share: checks of their arguments, a gradient through the prior's estimate of x_0, resampling."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution

from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_count
from rtb_inverse.diagnostics import effective_sample_size, log_mean_weight
from rtb_inverse.distributions import GaussianStep
from rtb_inverse.particles import systematic
from rtb_inverse.problems import InverseProblem


def prepare(prior: Prior, problem: InverseProblem, y: Tensor | None) -> Tensor | None:
    """Bind the problem to the prior's shape; returns y in the prior's device and dtype.

    Raises:
        TypeError: a prior or a problem that is none. ValueError: shapes that do not fit; y that is not a finite batch (B, *y_shape).
    """
    if not isinstance(prior, Prior):
        raise TypeError(f"prior must be a Prior, got {type(prior).__name__}")
    if not isinstance(problem, InverseProblem):
        raise TypeError(f"problem must be an InverseProblem, got {type(problem).__name__}")
    y = problem.bind(prior.data_shape).check_y(y)
    return y if y is None else y.to(**prior._options())


def check_differentiable(method: str, problem: InverseProblem) -> None:
    """Raise ValueError where the operator has no gradient."""
    if not problem.differentiable:
        raise ValueError(f"problem must have a differentiable operator for {method}, got one whose output carries no gradient")


def check_fraction(name: str, value: float) -> float:
    """Return `value` if it is in [0, 1]; raise ValueError otherwise."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return value


@torch.enable_grad()
def estimate_and_gradient(
    prior: Prior, x_t: Tensor, t: Tensor, objective: Callable[[Tensor], Tensor], batch_size: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The prior's estimate x0hat of x_0, g(x0hat), and the gradient of g(x0hat(x_t)) in x_t, through the denoiser.

    Args:
        x_t: (N, B, *shape). t: one time.
        objective: g, from (n, B, *shape) to (n, B), draw by draw.
        batch_size: most draws per observation in one call of the denoiser, which bounds the memory; all by default.

    Returns:
        x0hat (N, B, *shape), g (N, B), gradient (N, B, *shape), all detached.
    """
    parts = []
    for part in x_t.split(len(x_t) if batch_size is None else check_count("batch_size", batch_size)):
        part = part.detach().requires_grad_()
        x_0 = prior.denoise(part, t)
        value = objective(x_0)
        parts.append((x_0.detach(), value.detach(), torch.autograd.grad(value.sum(), part)[0]))
    x_0, value, gradient = (torch.cat(column) for column in zip(*parts, strict=True))
    return x_0, value, gradient


def own_step(prior: Prior, x_t: Tensor, t: Tensor, s: Tensor, base: GaussianStep) -> Distribution:
    """p(x_s | x_t), which is `base`, the Gaussian step around the prior's estimate, unless the prior has another transition. So one call
    of the network gives both."""
    return base if type(prior).transition is Prior.transition else prior.transition(x_t, t, s)


def resample(
    states: tuple[Tensor, ...], log_w: Tensor, log_z: Tensor, threshold: float, generator: Generator | None
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Systematic resampling of the observations whose effective sample size is below threshold N.

    Args:
        states: tensors (N, B, ...). log_w: (N, B). log_z: (B,), the log of the mean weights so far.

    Returns:
        The states, their weights, and log_z; of an observation that was resampled, the weights are 0 and log_z took up their mean.
    """
    n, b = log_w.shape
    poor = effective_sample_size(log_w) < threshold * n
    if not poor.any():
        return states, log_w, log_z
    stay = torch.arange(n, device=log_w.device)[:, None]
    pick = torch.where(poor, systematic(log_w, n, generator), stay), torch.arange(b, device=log_w.device)
    log_z = log_z + torch.where(poor, log_mean_weight(log_w), torch.zeros_like(log_z))
    return tuple(x[pick] for x in states), log_w.masked_fill(poor, 0.0), log_z
