"""Sequential Monte Carlo along the reverse chain."""

from itertools import pairwise

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_count, check_fraction
from rtb_inverse.corrections.twists import make_twist
from rtb_inverse.corrections.weights import log_likelihood, runs_within, thin
from rtb_inverse.diagnostics import effective_sample_size, log_mean_weight
from rtb_inverse.distributions import draw
from rtb_inverse.particles import Particles, check_possible, systematic
from rtb_inverse.posterior import Posterior


@torch.no_grad()
def smc(
    posterior: Posterior, y: Tensor | None = None, n: int = 256, generator: Generator | None = None, *, twist: str | None = None,
    threshold: float = 0.5, budget: float | None = None, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""Sequential Monte Carlo along the reverse chain, the posterior's steps as proposals (Wu et al. 2023, arXiv 2306.17775; with a
    `Posterior(start="prior")` that is not trained it is their twisted diffusion sampler without a gradient in the proposal).

    The weights after each step are those of p(x_T .. x_s) psi_s(x_s), psi_0 = p(y | x_0)^beta, and are resampled systematically
    wherever their effective sample size falls below `threshold` n. The mean weight at the end estimates Z(y) without bias.

    Args:
        posterior: proposal and target.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: particles per observation, at least 2.
        twist: psi: "guide", what the posterior's guide knows of p(y | x_s) (`twists`), the default wherever it knows anything;
            "likelihood", of y at the prior's estimate of x_0, flattened by what that estimate does not know (`twist_log_likelihood`);
            or "none", 1. None of them needs the posterior's network.
        threshold: in [0, 1]; 0 never resamples, which is importance sampling.
        budget: most network evaluations per draw, at least those of one particle: as many of these as it lasts for, of which n are
            resampled by their weights at the end; log_w is then log_z for all.

    Returns:
        Particles(x (n, B, *data_shape), log_w (n, B)), with info `evaluations`, and `log_z_error` (B,) by the weight that each first
        particle's offspring has at the end (`ancestral_error`); with a budget also `ess` (B,), of all particles.

    Raises:
        ValueError: bad arguments; "guide" where there is none; a likelihood of NaN or +inf; an observation all of whose particles have a
            weight of 0.
    """
    check_count("n", n, 2)
    check_fraction("threshold", threshold)
    y, prior = posterior.check_y(y), posterior.prior
    N, b = n * runs_within(budget, "smc", posterior), 1 if y is None else len(y)
    psi_of = make_twist(posterior, y, twist)
    shares = type(prior).transition is Prior.transition  # then its step is one around the very estimate that psi needs

    x, times = draw(posterior.initial((N, b)), generator), posterior.times
    estimate = prior.denoise(x, times[0]) if shares or psi_of else None
    psi = psi_of(x, estimate, times[0]) if psi_of else x.new_zeros((N, b))
    log_w, log_z, first = psi, x.new_zeros(b), torch.arange(N, device=x.device)[:, None].expand(N, b)
    for t, s in tqdm(pairwise(times), "particles", total=posterior.steps, disable=not progress, leave=False):
        proposal = posterior.transition(x, t, s, y)
        step = prior.gaussian_step(x, estimate, t, s) if shares else prior.transition(x, t, s)
        x = draw(proposal, generator)
        log_w = log_w + step.log_prob(x) - proposal.log_prob(x) - psi
        if s == times[-1]:
            log_w = check_possible("weights of the particles", log_w + log_likelihood(posterior, x, y))
            break
        estimate = prior.denoise(x, s) if shares or psi_of else None
        psi = psi_of(x, estimate, s) if psi_of else psi
        log_w = check_possible("weights of the particles", log_w + psi)
        known = (x, psi, first) if estimate is None else (x, psi, first, estimate)
        (x, psi, first, *rest), log_w, log_z = resample(known, log_w, log_z, threshold, generator)
        estimate = rest[0] if rest else None
    info = {"evaluations": float(N // n * posterior.evaluations()), "log_z_error": ancestral_error(log_w, first)}
    particles = Particles(posterior.decode(x), log_w + log_z, info)
    return particles if budget is None else thin(particles, n, generator)


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


def ancestral_error(log_w: Tensor, first: Tensor) -> Tensor:
    """Standard error of log Z, (B,), from one run: sqrt(sum_a W_a^2 - 1 / N), W_a the share of the weight at the end that descends from
    particle a at the start (Chan and Lai 2013, Annals of Statistics 41, 2877; Lee and Whiteley 2018, Biometrika 105, 609; without any
    resampling it is `particles.delta_error`). Too small itself where few particles at the start have offspring.

    Args:
        log_w: (N, B). first: which of the N each descends from, (N, B).
    """
    weights = log_w.softmax(0)
    shares = torch.zeros_like(weights).scatter_add(0, first, weights)
    return (shares.square().sum(0) - 1 / len(log_w)).clamp_min(0).sqrt()
