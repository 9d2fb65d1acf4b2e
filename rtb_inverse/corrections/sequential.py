"""Sequential Monte Carlo along the reverse chain."""

from itertools import pairwise

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from rtb_inverse.checks import check_count, check_fraction
from rtb_inverse.corrections.twists import Twist, make_twist, own_step
from rtb_inverse.corrections.weights import log_likelihood, runs_within, thin
from rtb_inverse.diagnostics import effective_sample_size, log_mean_weight
from rtb_inverse.distributions import draw
from rtb_inverse.particles import Particles, check_possible, systematic
from rtb_inverse.posterior import Posterior, check_posterior

FEWEST_PATHS, MOST_PATHS = 16, 256  # of a pilot, by default: in all, and for each observation


@torch.no_grad()
def smc(
    posterior: Posterior, y: Tensor | None = None, n: int = 256, generator: Generator | None = None, *, twist: str | None = None,
    pilot: int | None = None, threshold: float = 0.5, budget: float | None = None, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""Sequential Monte Carlo along the reverse chain, the posterior's steps as proposals (Wu et al. 2023, arXiv 2306.17775; with a
    `Posterior(start="prior")` that is not trained it is their twisted diffusion sampler without a gradient in the proposal).

    The weights after each step are those of p(x_T .. x_s) psi_s(x_s)^c_s, psi_0^c_0 = p(y | x_0)^beta, and are resampled systematically
    wherever their effective sample size falls below `threshold` n. The mean weight at the end estimates Z(y) without bias, whatever
    the powers c_s are. A pilot, a few paths of the posterior that are drawn first, measures them (`measured_powers`; twists that learn
    from a run before: Guarniero, Johansen, Lee 2017, arXiv 1511.06286; Heng et al. 2020, arXiv 1708.08396).

    Args:
        posterior: proposal and target.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: particles per observation, at least 2.
        twist: psi: "guide", what the posterior's guide knows of p(y | x_s) (`twists`), the default wherever it knows anything;
            "likelihood", of y at the prior's estimate of x_0, flattened by what that estimate does not know (`twist_log_likelihood`);
            or "none", 1. None of them needs the posterior's network.
        pilot: paths for each observation that measure the powers c_s, the same for all observations; at least 3, or 0: all are 1. By
            default, for a guided posterior of a network's prior (one whose chain is not the exact reversal), a quarter of n, at most
            256, or 0 where that would be fewer than 16 in all; 0 for others. Without a twist there is no power to measure.
        threshold: in [0, 1]; 0 never resamples, which is importance sampling.
        budget: most network evaluations per draw, at least those of one particle: as many of these as it lasts for, the pilot's among them
            (a fifth by default, in place of a quarter), of which n are resampled by their weights at the end; log_w is then log_z for all.

    Returns:
        Particles(x (n, B, *data_shape), log_w (n, B)), with info `evaluations`, and `log_z_error` (B,) by the weight that each first
        particle's offspring has at the end (`ancestral_error`); with a budget also `ess` (B,), of all particles.

    Raises:
        ValueError: bad arguments; "guide" where there is none; a likelihood of NaN or +inf; an observation all of whose particles have a
            weight of 0.
    """
    check_posterior(posterior), check_count("n", n, 2)
    check_fraction("threshold", threshold)
    if pilot is not None and (isinstance(pilot, bool) or not isinstance(pilot, int) or pilot < 0 or pilot in (1, 2)):
        raise ValueError(f"pilot must be 0 or an integer of at least 3, got {pilot!r}")
    y, prior, times = posterior.check_y(y), posterior.prior, posterior.times
    runs, b = runs_within(budget, "smc", posterior), 1 if y is None else len(y)
    psi_of = make_twist(posterior, y, twist)
    learns = psi_of is not None and posterior.start == "guided" and not prior.exact_reversal
    pilot, N = share_out(0 if psi_of is None else pilot, n, b if learns else 0, None if budget is None else runs)
    power = measured_powers(posterior, y, pilot, psi_of, generator, progress) if pilot and psi_of else None

    def twist_at(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The prior's estimate, and log psi^c, (N, B)."""
        x_0 = prior.denoise(x, times[k])
        psi = psi_of(x, x_0, times[k]) if psi_of else x.new_zeros(x.shape[:2])
        return x_0, psi if power is None else power[k] * psi

    x = draw(posterior.initial((N, b)), generator)
    x_0, psi = twist_at(x, 0)
    log_w, log_z, first = psi, x.new_zeros(b), torch.arange(N, device=x.device)[:, None].expand(N, b)
    for k, (t, s) in enumerate(tqdm(pairwise(times), "particles", total=posterior.steps, disable=not progress, leave=False)):
        x, log_ratio = proposed(posterior, x, x_0, t, s, y, generator)
        log_w = log_w + log_ratio - psi
        if s == times[-1]:
            log_w = check_possible("weights of the particles", log_w + log_likelihood(posterior, x, y))
            break
        x_0, psi = twist_at(x, k + 1)
        log_w = check_possible("weights of the particles", log_w + psi)
        (x, x_0, psi, first), log_w, log_z = resample((x, x_0, psi, first), log_w, log_z, threshold, generator)
    info = {"evaluations": (N + pilot) / n * posterior.evaluations(), "log_z_error": ancestral_error(log_w, first)}
    particles = Particles(posterior.decode(x), log_w + log_z, info)
    return particles if budget is None else thin(particles, n, generator)


def share_out(pilot: int | None, n: int, learns: int, runs: int | None) -> tuple[int, int]:
    """Paths of the pilot, and particles, for each observation: n particles, or with a budget as many as its `runs` a draw leave over.
    `learns`: of how many observations the powers are learnt by default."""
    every = n if runs is None else n * runs
    spare = every if runs is None else every - n
    if pilot is None:
        part = min(every // (4 if runs is None else 5), spare, MOST_PATHS)
        pilot = part if part >= 3 and part * learns >= FEWEST_PATHS else 0
    if pilot > spare:
        raise ValueError(f"pilot must leave n of the {every} paths that the budget lasts for, got {pilot}; expected at most {spare}, or 0")
    return pilot, every if runs is None else every - pilot


def proposed(
    posterior: Posterior, x: Tensor, x_0: Tensor, t: Tensor, s: Tensor, y: Tensor | None, generator: Generator | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_s (N, B, *shape) from the posterior's step, and log p(x_s | x_t) - log q(x_s | x_t, y), (N, B); x_0: the prior's estimate."""
    prior, proposal = posterior.prior, posterior.transition(x, t, s, y)
    step = own_step(prior, x, t, s, prior.gaussian_step(x, x_0, t, s))
    x_s = draw(proposal, generator)
    return x_s, step.log_prob(x_s) - proposal.log_prob(x_s)


def measured_powers(
    posterior: Posterior, y: Tensor | None, n: int, psi_of: Twist, generator: Generator | None, progress: bool = False
) -> Tensor:  # fmt: skip
    """c_t for each of the K times, (K,): of n paths for each observation, the slope of the weight that is still to come (log p - log q
    from t on, and the likelihood) against log psi_t, by least squares about the means of each observation, within 0 and 1, and drawn
    towards 1 as a prior N(1, 1) would draw it.

    Near the posterior the mean of what is to come says what psi should (of proposals far from it the mean of its exponential does, which
    this is not). A network's estimate at the next state does not move as a Gaussian's would, so that psi scatters by more than it tells.
    """
    prior, x, psi, gains = posterior.prior, draw(posterior.initial((n, 1 if y is None else len(y))), generator), [], []
    for t, s in tqdm(pairwise(posterior.times), "pilot", total=posterior.steps, disable=not progress, leave=False):
        x_0 = prior.denoise(x, t)
        psi.append(psi_of(x, x_0, t))
        x, log_ratio = proposed(posterior, x, x_0, t, s, y, generator)
        gains.append(log_ratio.double())
    gains[-1] = gains[-1] + log_likelihood(posterior, x, y)
    to_come = torch.stack(gains).flip(0).cumsum(0).flip(0)
    possible = to_come.isfinite()  # not those that y forbids

    def centred(v: Tensor) -> Tensor:
        mean = v.where(possible, 0.0).sum(1, keepdim=True) / possible.sum(1, keepdim=True).clamp_min(1)
        return (v - mean).where(possible, 0.0)

    u, v = centred(torch.stack(psi).double()), centred(to_come)
    square = u.square().sum((1, 2))
    tiny = torch.finfo(square.dtype).tiny  # a twist that is the same for all has a square of 0, and its power stays 1
    slope = (u * v).sum((1, 2)) / square.clamp_min(tiny)
    scatter = (v - slope[:, None, None] * u).square().sum((1, 2)) / possible.sum((1, 2)).clamp_min(1)
    certain = square / (square + scatter).clamp_min(tiny)
    return torch.lerp(torch.ones_like(slope), slope, certain).clamp(0, 1).to(x.dtype)


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
