"""Sequential Monte Carlo along the reverse chain."""

from itertools import pairwise

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_count, check_fraction
from rtb_inverse.corrections.twists import Twist, make_twist
from rtb_inverse.corrections.weights import log_likelihood, runs_within, thin
from rtb_inverse.diagnostics import effective_sample_size, log_mean_weight
from rtb_inverse.distributions import draw
from rtb_inverse.particles import Particles, check_possible, systematic
from rtb_inverse.posterior import Posterior

FEWEST = 16  # paths of a pilot, in all
LARGEST = 2.0  # power of a twist that a pilot says


@torch.no_grad()
def smc(
    posterior: Posterior, y: Tensor | None = None, n: int = 256, generator: Generator | None = None, *, twist: str | None = None,
    pilot: int | None = None, threshold: float = 0.5, budget: float | None = None, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""Sequential Monte Carlo along the reverse chain, the posterior's steps as proposals (Wu et al. 2023, arXiv 2306.17775; with a
    `Posterior(start="prior")` that is not trained it is their twisted diffusion sampler without a gradient in the proposal).

    The weights after each step are those of p(x_T .. x_s) psi_s(x_s)^c_s, psi_0^c_0 = p(y | x_0)^beta, and are resampled systematically
    wherever their effective sample size falls below `threshold` n. The mean weight at the end estimates Z(y) without bias, whatever
    the powers c_s are. Those of a twist that is not exact come from a few paths of the posterior that are drawn first (`measured_powers`;
    twists that learn from a run before: Guarniero, Johansen, Lee 2017, arXiv 1511.06286; Heng et al. 2020, arXiv 1708.08396).

    Args:
        posterior: proposal and target.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: particles per observation, at least 2.
        twist: psi: "guide", what the posterior's guide knows of p(y | x_s) (`twists`), the default wherever it knows anything;
            "likelihood", of y at the prior's estimate of x_0, flattened by what that estimate does not know (`twist_log_likelihood`);
            or "none", 1. None of them needs the posterior's network.
        pilot: paths for each observation that measure the powers c_s, one for all of them; 0, or at least 3; 0: all are 1. By default a
            quarter of n, but 0 where these would be fewer than 16 in all, without a twist, and for a prior whose chain is the exact
            reversal (`exact_reversal`), whose twists need no power.
        threshold: in [0, 1]; 0 never resamples, which is importance sampling.
        budget: most network evaluations per draw, at least those of one particle: as many of these as it lasts for, the pilot's among them
            (a fifth by default), of which n are resampled by their weights at the end; log_w is then log_z for all.

    Returns:
        Particles(x (n, B, *data_shape), log_w (n, B)), with info `evaluations`, and `log_z_error` (B,) by the weight that each first
        particle's offspring has at the end (`ancestral_error`); with a budget also `ess` (B,), of all particles.

    Raises:
        ValueError: bad arguments; "guide" where there is none; a likelihood of NaN or +inf; an observation all of whose particles have a
            weight of 0.
    """
    check_count("n", n, 2)
    check_fraction("threshold", threshold)
    y, prior, times = posterior.check_y(y), posterior.prior, posterior.times
    runs, b = runs_within(budget, "smc", posterior), 1 if y is None else len(y)
    psi_of = make_twist(posterior, y, twist)
    pilot = 0 if psi_of is None else pilot
    pilot, N = share_out(pilot, n, None if budget is None else runs, 0 if prior.exact_reversal else b)
    power = measured_powers(posterior, y, pilot, psi_of, generator) if pilot and psi_of else None
    asks = psi_of is not None or prior_steps_from_estimate(prior)

    def twist_at(x: Tensor, k: int) -> tuple[Tensor | None, Tensor]:
        """The prior's estimate, where one is needed, and log psi^c, (N, B)."""
        estimate = prior.denoise(x, times[k]) if asks else None
        psi = psi_of(x, estimate, times[k]) if psi_of else x.new_zeros(x.shape[:2])
        return estimate, psi if power is None else power[k] * psi

    x = draw(posterior.initial((N, b)), generator)
    estimate, psi = twist_at(x, 0)
    log_w, log_z, first = psi, x.new_zeros(b), torch.arange(N, device=x.device)[:, None].expand(N, b)
    for k, (t, s) in enumerate(tqdm(pairwise(times), "particles", total=posterior.steps, disable=not progress, leave=False)):
        x, log_ratio = proposed(posterior, x, estimate, t, s, y, generator)
        log_w = log_w + log_ratio - psi
        if s == times[-1]:
            log_w = check_possible("weights of the particles", log_w + log_likelihood(posterior, x, y))
            break
        estimate, psi = twist_at(x, k + 1)
        log_w = check_possible("weights of the particles", log_w + psi)
        known = (x, psi, first) if estimate is None else (x, psi, first, estimate)
        (x, psi, first, *rest), log_w, log_z = resample(known, log_w, log_z, threshold, generator)
        estimate = rest[0] if rest else None
    info = {"evaluations": (N + pilot) / n * posterior.evaluations(), "log_z_error": ancestral_error(log_w, first)}
    particles = Particles(posterior.decode(x), log_w + log_z, info)
    return particles if budget is None else thin(particles, n, generator)


def share_out(pilot: int | None, n: int, runs: int | None, learns: int) -> tuple[int, int]:
    """Paths of the pilot, and particles, for each of `learns` observations whose powers are to be learnt: n particles, or with a budget as
    many as its `runs` a draw leave over."""
    every = n if runs is None else n * runs
    if pilot is None:
        part = every // 4 if runs is None else min(every // 5, every - n)
        pilot = part if part * learns >= FEWEST else 0
    if pilot != 0:
        check_count("pilot", pilot, 3)
    if runs is not None and pilot > every - n:
        raise ValueError(f"pilot must leave n of the {every} paths that the budget lasts for, got {pilot}; expected at most {every - n}")
    return pilot, every if runs is None else every - pilot


def prior_steps_from_estimate(prior: Prior) -> bool:
    """Whether the prior's step is one around the very estimate that psi needs."""
    return type(prior).transition is Prior.transition


def proposed(
    posterior: Posterior, x: Tensor, estimate: Tensor | None, t: Tensor, s: Tensor, y: Tensor | None, generator: Generator | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x_s (N, B, *shape) from the posterior's step, and log p(x_s | x_t) - log q(x_s | x_t, y), (N, B)."""
    prior, proposal = posterior.prior, posterior.transition(x, t, s, y)
    step = prior.gaussian_step(x, estimate, t, s) if prior_steps_from_estimate(prior) else prior.transition(x, t, s)
    x_s = draw(proposal, generator)
    return x_s, step.log_prob(x_s) - proposal.log_prob(x_s)


def measured_powers(posterior: Posterior, y: Tensor | None, n: int, psi_of: Twist, generator: Generator | None) -> Tensor:
    """c_t for each of the K times, (K,): of n paths for each observation, the slope of the weight that is still to come (log p - log q
    from t on, and the likelihood) against log psi_t, by least squares about the means of each observation, within 0 and `LARGEST`.
    A network's estimate at the next state does not move as a Gaussian's would, and the whole of psi scatters by more than it tells.
    """
    prior, x, psi, gains = posterior.prior, draw(posterior.initial((n, 1 if y is None else len(y))), generator), [], []
    for t, s in pairwise(posterior.times):
        estimate = prior.denoise(x, t)
        psi.append(psi_of(x, estimate, t))
        x, log_ratio = proposed(posterior, x, estimate, t, s, y, generator)
        gains.append(log_ratio)
    gains[-1] = gains[-1] + log_likelihood(posterior, x, y)
    to_come = torch.stack(gains).flip(0).cumsum(0).flip(0).double()
    seen = to_come.isfinite()  # not those that y forbids

    def centred(v: Tensor) -> Tensor:
        mean = v.where(seen, 0.0).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp_min(1)
        return (v - mean).where(seen, 0.0)

    off, told = centred(torch.stack(psi).double()), centred(to_come)
    slope = (off * told).sum((1, 2)) / off.square().sum((1, 2))
    return slope.nan_to_num(1.0).clamp(0, LARGEST).to(x.dtype)  # 0 / 0: a twist that is the same for all


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
