r"""The twisted diffusion sampler (Wu et al. 2023, arXiv 2306.17775, algorithm 1).

Sequential Monte Carlo along the prior's chain. A twist psi_t(x_t) says how likely y is from x_t, and its gradient moves the proposal:

    psi_t(x_t)    = p(y | x0hat(x_t)) ^ flatness_t,    psi_0(x_0) = p(y | x_0)
    q(x_s | x_t)  = N(m + v grad log psi_t(x_t), v),    m and v those of the prior's Gaussian step
    log w        += log p(x_s | x_t) - log q(x_s | x_t) + log psi_s(x_s) - log psi_t(x_t)

The intermediate targets are p(x_T .. x_s) psi_s(x_s), the last one p(tau) p(y | x_0): whatever the twist, the mean weight estimates Z(y)
without bias. The twist is `corrections.twist_log_likelihood`. A prior whose own step p(x_s | x_t) is another distribution (a mixture's)
is proposed to by its Gaussian step, and weighed by its own.
"""

from itertools import pairwise

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from rtb_inverse.baselines.common import check_differentiable, estimate_and_gradient, prepare
from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_count, check_finite, check_fraction, check_positive
from rtb_inverse.corrections import own_step, resample, twist_log_likelihood
from rtb_inverse.distributions import draw
from rtb_inverse.particles import Particles
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import InverseProblem


@torch.no_grad()
def twisted(
    prior: Prior, problem: InverseProblem, y: Tensor | None = None, n: int = 256, generator: Generator | None = None, *,
    threshold: float = 0.5, spread: float = 1.0, batch_size: int | None = None, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""The twisted diffusion sampler (Wu et al. 2023, arXiv 2306.17775, algorithm 1).

    Args:
        prior: the prior's chain.
        problem: the measurement model, with a differentiable operator; bound to the prior's shape here.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: particles per observation, at least 2.
        threshold: resample where the effective sample size falls below threshold n; in [0, 1], 0 never resamples.
        spread: variance of A x_0 for each of x_0 by which a Gaussian likelihood is flattened, > 0. Where the operator magnifies, its
            largest singular value squared keeps the proposals' steps along the gradient from overshooting.
        batch_size: most draws per observation in one call of the denoiser with its gradient, which bounds the memory; all by default.

    Returns:
        Particles(x (n, B, *data_shape), log_w (n, B)), whose `log_z` estimates log Z(y), Z without bias; its error is not known from
        one run.

    Raises:
        TypeError, ValueError: arguments that are none or do not fit; an operator without gradient; weights that are not finite.
    """
    y = prepare(prior, problem, y)
    check_count("n", n, 2), check_fraction("threshold", threshold), check_positive("spread", spread)
    check_differentiable("twisted", problem, prior)
    target = Posterior(prior, problem, "prior", network=torch.nn.Identity())  # its likelihood and errors; its network is never called
    b = 1 if y is None else len(y)

    def twist(x, t):
        return estimate_and_gradient(prior, x, t, lambda x_0: twist_log_likelihood(target, x_0, t, y, spread), batch_size)

    x = draw(prior.initial((n, b)), generator)
    estimate, psi, gradient = twist(x, prior.times[0])
    log_w, log_z = psi, x.new_zeros(b)
    for k, (t, s) in enumerate(tqdm(pairwise(prior.times), "particles", total=prior.steps, disable=not progress, leave=False)):
        base = prior.gaussian_step(x, estimate, t, s)
        law = own_step(prior, x, t, s, base)
        shift = base.variance * gradient
        x = draw(base, generator) + shift
        log_w = log_w + law.log_prob(x) - base.log_prob(x - shift) - psi
        if k == prior.steps - 1:
            log_w = log_w + target.log_likelihood(x, y)
        else:
            estimate, psi, gradient = twist(x, s)
            log_w = check_finite("weights of the particles", log_w + psi)
            (x, estimate, psi, gradient), log_w, log_z = resample((x, estimate, psi, gradient), log_w, log_z, threshold, generator)
    return Particles(prior.decode(x), check_finite("weights of the particles", log_w + log_z))
