"""What the rival methods share: checks of their arguments, a gradient through the prior's estimate of x_0, a search of their settings."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_count, check_finite
from rtb_inverse.corrections import own_step
from rtb_inverse.diagnostics import crps
from rtb_inverse.distributions import draw
from rtb_inverse.particles import Particles
from rtb_inverse.problems import TRIED, InverseProblem


def prepare(prior: Prior, problem: InverseProblem, y: Tensor | None) -> Tensor | None:
    """Bind the problem to the prior's shape; returns y in the prior's device and dtype.

    Raises:
        TypeError: a prior or a problem that is none. ValueError: shapes that do not fit; y that is not a finite batch (B, *y_shape).
    """
    if not isinstance(prior, Prior):
        raise TypeError(f"prior must be a Prior, got {type(prior).__name__}")
    if not isinstance(problem, InverseProblem):
        raise TypeError(f"problem must be an InverseProblem, got {type(problem).__name__}")
    options, problem = prior._options(), problem.bind(prior.data_shape, prior.examples(TRIED))
    y = problem.check_y(y.to(options["device"]) if isinstance(y, Tensor) else y)
    return y if y is None else y.to(**options)


def check_differentiable(method: str, problem: InverseProblem, prior: Prior) -> None:
    """Raise ValueError where the operator, or the prior's `decode`, has no gradient."""
    if not problem.differentiable:
        raise ValueError(f"problem must have a differentiable operator for {method}, got one whose output carries no gradient")
    if not prior.differentiable:
        raise ValueError(f"prior must have a differentiable decode for {method}, got one whose x carries no gradient")


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


def descend(
    prior: Prior, n: int, b: int, move: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], name: str, generator: Generator | None,
    progress: bool,
) -> Particles:  # fmt: skip
    """The prior's chain, each of its steps followed by a move: n draws for each of b observations.

    Args:
        move: (x_t (N, B, *shape), t) to the prior's estimate of x_0 and the move of x_s. name: of the method, where it diverges.
    """
    x = draw(prior.initial((n, b)), generator)
    for t, s in tqdm(pairwise(prior.times), "denoising", total=prior.steps, disable=not progress, leave=False):
        estimate, delta = move(x, t)
        step = own_step(prior, x, t, s, prior.gaussian_step(x, estimate, t, s))
        x = check_finite(f"states of {name}", draw(step, generator) + delta)
    x = prior.decode(x)
    return Particles(x, x.new_zeros(x.shape[:2]))


def tuned(
    method: Callable[..., Particles], prior: Prior, problem: InverseProblem, x: Tensor, y: Tensor, settings: Sequence[dict], n: int = 8,
    generator: Generator | None = None, **options,
) -> dict:  # fmt: skip
    """Of several settings of a method's arguments those whose draws are nearest, in CRPS, to the x (B, *data_shape) that made y; what
    diverges is passed over.

    Raises:
        ValueError: where none is given, or all diverge.
    """
    found = {}
    for k, setting in enumerate(settings):
        with suppress(ValueError):  # states that left the finite numbers
            draws = method(prior, problem, y, n, generator, **setting, **options).x
            found[k] = float(crps(draws, x.to(draws.device)).mean())
    if not found:
        tried = ", ".join(" and ".join(f"{name} = {value:g}" for name, value in setting.items()) for setting in settings)
        raise ValueError(f"at least one setting must be given that does not diverge, got {tried or 'none'}")
    return settings[min(found, key=found.__getitem__)]
