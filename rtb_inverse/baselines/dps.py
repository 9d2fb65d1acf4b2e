r"""Diffusion Posterior Sampling (Chung et al. 2023, arXiv 2209.14687, algorithm 1).

Every step of the prior's chain is followed by one step down the data residual, through the prior's estimate of x_0:

    x'_s ~ p(x_s | x_t)
    x_s  = x'_s - zeta_t grad_{x_t} |y - A(x0hat(x_t))|^2,        zeta_t = zeta / |y - A(x0hat(x_t))|

which is 2 zeta times the gradient of the norm itself. (The authors' code moves by half of that, zeta times the gradient of the norm.)
With another noise than Gaussian, or a reward, no residual norm is at hand, and x_s = x'_s + zeta grad_{x_t} log p(y | x0hat(x_t)).

The draws are a fast guess, not the posterior: p(y | x_t) is replaced by p(y | x0hat), and zeta is set by eye. They carry no weights.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from rtb_inverse.baselines.common import check_differentiable, descend, estimate_and_gradient, prepare, tuned
from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_count, check_positive
from rtb_inverse.particles import Particles
from rtb_inverse.problems import GaussianNoise, InverseProblem
from rtb_inverse.schedules import expand


@torch.no_grad()
def dps(
    prior: Prior, problem: InverseProblem, y: Tensor | None = None, n: int = 64, generator: Generator | None = None, *,
    zeta: float = 1.0, batch_size: int | None = None, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""Diffusion Posterior Sampling (Chung et al. 2023, arXiv 2209.14687, algorithm 1).

    Args:
        prior: the prior's chain.
        problem: the measurement model, with a differentiable operator; bound to the prior's shape here.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: draws per observation, at least 1.
        zeta: step size, > 0; the authors take 0.3 to 1 at 1,000 steps. For Gaussian noise a move is 2 zeta times the slope of the norm.
        batch_size: most draws per observation in one call of the denoiser with its gradient, which bounds the memory; all by default.
            It changes nothing else.

    Returns:
        Particles(x (n, B, *data_shape), log_w = 0).

    Raises:
        TypeError, ValueError: arguments that are none or do not fit; an operator without gradient; states that left the finite numbers,
            as a zeta that is too large makes them.
    """
    y = prepare(prior, problem, y)
    check_count("n", n), check_positive("zeta", zeta)
    check_differentiable("dps", problem, prior)
    b = 1 if y is None else len(y)
    move = partial(residual_step, prior, problem, y=y, zeta=zeta, batch_size=batch_size)
    return descend(prior, n, b, move, f"dps at zeta = {zeta}", generator, progress)


def residual_step(
    prior: Prior, problem: InverseProblem, x_t: Tensor, t: Tensor, y: Tensor | None, zeta: float, batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """x0hat(x_t), and the move of each draw towards y; (N, B, *shape) both. Noise levels that differ from element to element weigh the
    residual by their inverse, relative to the mean level."""
    if not isinstance(problem.noise, GaussianNoise):
        estimate, _, gradient = estimate_and_gradient(
            prior, x_t, t, lambda x_0: problem.log_likelihood(prior.decode(x_0), y), batch_size
        )  # fmt: skip
        return estimate, zeta * gradient
    std = problem.noise.std.to(x_t)

    def square(x_0):
        residual = (y - problem(prior.decode(x_0))) * (std.mean() / std)
        return residual.reshape(*residual.shape[:2], -1).square().sum(-1)

    estimate, norm2, gradient = estimate_and_gradient(prior, x_t, t, square, batch_size)
    norm = norm2.sqrt().clamp_min(torch.finfo(x_t.dtype).tiny)  # where the residual is 0, so is its gradient
    return estimate, -expand(zeta / norm, gradient) * gradient


def tuned_zeta(
    prior: Prior, problem: InverseProblem, x: Tensor, y: Tensor, zetas: Sequence[float], n: int = 8, generator: Generator | None = None,
    progress: bool = False,
) -> float:  # fmt: skip
    """Of several step sizes that whose draws are nearest, in CRPS, to the x (B, *data_shape) that made y; what diverges is passed over.

    Raises:
        ValueError: where none is given, or all diverge.
    """
    return tuned(dps, prior, problem, x, y, [{"zeta": zeta} for zeta in zetas], n, generator, progress=progress)["zeta"]
