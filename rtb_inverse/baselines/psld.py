r"""Posterior Sampling with Latent Diffusion (Rout et al. 2023, arXiv 2307.00619, algorithm 2).

DPS in the latents z of an autoencoder (x = D(z), z = E(x)), and a second slope, which glues the estimate of z_0 to a latent whose decoded
image agrees with y and encodes to itself:

    z'_s ~ p(z_s | z_t),      x0hat = D(z0hat(z_t))
    z_s  = z'_s - grad_{z_t} ( 2 zeta |y - A(x0hat)| + gamma |z0hat - E(x0hat + A^+ (y - A(x0hat)))| )

A^+ r is one step of steepest descent down |r - A v|^2 from v = 0, which is the pseudo-inverse where A A^T is a multiple of the identity
(masks, averages, orthonormal rows), the authors' case. zeta is that of `dps`, of which this is gamma = 0.

The draws are a fast guess, not the posterior, as those of DPS are. They carry no weights.
"""

import torch
from torch import Generator, Tensor

from rtb_inverse.baselines.common import check_differentiable, descend, estimate_and_gradient, prepare
from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_count, check_positive
from rtb_inverse.particles import Particles
from rtb_inverse.problems import GaussianNoise, InverseProblem


@torch.no_grad()
def psld(
    prior: Prior, problem: InverseProblem, y: Tensor | None = None, n: int = 64, generator: Generator | None = None, *,
    zeta: float = 1.0, gamma: float = 0.1, batch_size: int | None = None, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""Posterior Sampling with Latent Diffusion (Rout et al. 2023, arXiv 2307.00619, algorithm 2).

    Args:
        prior: the prior's chain, in the latents of an autoencoder: one with `encode` beside `decode`, as `priors.LatentPrior`.
        problem: the measurement model, linear under Gaussian noise; bound to the prior's shape here.
        y: observations, (B, *y_shape).
        n: draws per observation, at least 1.
        zeta: step size of the residual, > 0, as in `dps`. gamma: step size of the gluing, > 0; the authors take 0.1.
        batch_size: most draws per observation in one call of the networks with their gradient, which bounds the memory; all by default.

    Returns:
        Particles(x (n, B, *data_shape), log_w = 0).

    Raises:
        TypeError, ValueError: arguments that are none or do not fit; an operator that is not linear; a prior without `encode`; states that
            left the finite numbers, as step sizes that are too large make them.
    """
    y = prepare(prior, problem, y)
    check_count("n", n), check_positive("zeta", zeta), check_positive("gamma", gamma)
    if y is None or not problem.linear or not isinstance(problem.noise, GaussianNoise):
        raise ValueError("problem must be linear under Gaussian noise for psld, got another; dps takes any")
    if not hasattr(prior, "encode"):
        raise ValueError(f"prior must have encode, the latents of an image, for psld, got a {type(prior).__name__}; dps needs none")
    check_differentiable("psld", problem, prior)

    def distance(z_0):
        x_0 = prior.decode(z_0)
        residual = y - problem(x_0)
        glued = prior.encode(x_0 + pull_back(problem, x_0, residual))
        return 2 * zeta * norm(residual, problem.y_shape) + gamma * norm(z_0 - glued, prior.shape)

    def move(z_t, t):
        estimate, _, slope = estimate_and_gradient(prior, z_t, t, distance, batch_size)
        return estimate, -slope

    return descend(prior, n, len(y), move, f"psld at zeta = {zeta}, gamma = {gamma}", generator, progress)


def norm(v: Tensor, shape: torch.Size) -> Tensor:
    """Of each (*batch, *shape): (*batch); its gradient is 0 where it is."""
    return v.reshape(*v.shape[: v.ndim - len(shape)], -1).square().sum(-1).clamp_min(torch.finfo(v.dtype).tiny).sqrt()


def pull_back(problem: InverseProblem, x: Tensor, residual: Tensor) -> Tensor:
    """A^+ r, (N, B, *shape): the gradient A^T r times |A^T r|^2 / |A A^T r|^2."""
    back = torch.func.vjp(problem.forward, x)[1](residual)[0]  # type: ignore[misc]  # three only with has_aux
    forth = problem(back) - problem(torch.zeros_like(back))
    ratio = norm(back, problem.shape).square() / norm(forth, problem.y_shape).square()
    return back * ratio.detach().reshape(ratio.shape + (1,) * (x.ndim - ratio.ndim))
