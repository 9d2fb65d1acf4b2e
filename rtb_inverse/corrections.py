"""Corrections that use the exact path weights."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from rtb_inverse.chains import Chain, Prior, Trajectory, initial_log_prob, path_log_prob, renoise, rollout
from rtb_inverse.checks import check_choice, check_count, check_finite, check_fraction
from rtb_inverse.diagnostics import effective_draws, effective_sample_size, log_mean_weight, pareto_smooth, split_r_hat
from rtb_inverse.distributions import GaussianStep, draw
from rtb_inverse.particles import Particles, systematic
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise


@torch.no_grad()
def importance(
    posterior: Posterior, y: Tensor | None = None, n: int = 256, generator: Generator | None = None, *, batch_size: int | None = None,
    smooth: bool = False, chunk_size: int | None = 4096, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""Path importance sampling: draws with log w = log p(tau) + beta log p(y | x_0) - log q(tau | y).

    The mean weight estimates the evidence without bias (`Particles.log_z`, `log_z_error`), weighted means the posterior's.

    Args:
        posterior: proposal and target.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: draws per observation, at least 1.
        batch_size: most draws per observation rolled out at once; all by default.
        smooth: Pareto-smooth the weights (`diagnostics.pareto_smooth`): less variance, a little bias.
        chunk_size: most states in one scoring call.

    Returns:
        Particles(x (n, B, *data_shape), log_w (n, B)), with info `evaluations` and `k_hat` (B,), the Pareto shape of the largest weights:
        above 0.7 the weighted means and log_z are not to be trusted (inf too where there are too few draws to tell).
    """
    check_count("n", n)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    y = posterior.check_y(y)
    xs, log_ws = [], []
    for start in range(0, n, batch_size or n):
        paths = rollout(posterior, min(batch_size or n, n - start), y, generator, progress=progress)
        log_ws.append(path_log_weights(posterior, paths, chunk_size))
        xs.append(posterior.decode(paths.x_0))
    log_w = torch.cat(log_ws)
    smoothed, k_hat = pareto_smooth(log_w)
    return Particles(torch.cat(xs), smoothed if smooth else log_w, {"evaluations": float(posterior.steps), "k_hat": k_hat})


def path_log_weights(posterior: Posterior, paths: Trajectory, chunk_size: int | None) -> Tensor:
    """log p(tau) + beta log p(y | x_0) - log q(tau | y) of the posterior's own paths, (N, B)."""
    return path_log_prob(posterior.prior, paths, chunk_size) + posterior.log_likelihood(paths.x_0, paths.y) - paths.log_prob


@torch.no_grad()
def smc(
    posterior: Posterior, y: Tensor | None = None, n: int = 256, generator: Generator | None = None, *, twist: str = "likelihood",
    threshold: float = 0.5, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""Sequential Monte Carlo along the reverse chain, the posterior's steps as proposals (Wu et al. 2023, arXiv 2306.17775; with a
    `Posterior(start="prior")` that is not trained it is their twisted diffusion sampler without a gradient in the proposal).

    The weights after each step are those of p(x_T .. x_s) psi_s(x_s), psi_0 = p(y | x_0)^beta, and are resampled systematically
    wherever their effective sample size falls below `threshold` n. The mean weight at the end estimates Z(y) without bias.

    Args:
        posterior: proposal and target.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: particles per observation, at least 2.
        twist: psi: "likelihood", of y at the prior's estimate of x_0, flattened by what that estimate does not know
            (`twist_log_likelihood`), or "none", 1.
        threshold: in [0, 1]; 0 never resamples, which is importance sampling.

    Returns:
        Particles(x (n, B, *data_shape), log_w (n, B)), whose `log_z` is the estimate; its error is not known from one run.
    """
    check_count("n", n, 2)
    check_choice("twist", twist, ("likelihood", "none"))
    check_fraction("threshold", threshold)
    y, prior = posterior.check_y(y), posterior.prior
    b = 1 if y is None else len(y)
    x = draw(posterior.initial((n, b)), generator)
    shares = type(prior).transition is Prior.transition  # then its step is one around the very estimate that psi needs
    times = posterior.times
    estimate = prior.denoise(x, times[0]) if shares or twist == "likelihood" else None
    psi = twist_log_likelihood(posterior, estimate, times[0], y) if twist == "likelihood" else x.new_zeros((n, b))
    log_w, log_z = psi, x.new_zeros(b)
    for k, (t, s) in enumerate(tqdm(pairwise(times), "particles", total=posterior.steps, disable=not progress, leave=False)):
        proposal = posterior.transition(x, t, s, y)
        step = prior.gaussian_step(x, estimate, t, s) if shares else prior.transition(x, t, s)
        x = draw(proposal, generator)
        log_w = log_w + step.log_prob(x) - proposal.log_prob(x) - psi
        if k == posterior.steps - 1:
            psi = posterior.log_likelihood(x, y)
        else:
            estimate = prior.denoise(x, s) if shares or twist == "likelihood" else None
            psi = twist_log_likelihood(posterior, estimate, s, y) if twist == "likelihood" else torch.zeros_like(psi)
        log_w = check_finite("weights of the particles", log_w + psi)
        if k < posterior.steps - 1:
            known = (x, psi) if estimate is None else (x, psi, estimate)
            (x, psi, *rest), log_w, log_z = resample(known, log_w, log_z, threshold, generator)
            estimate = rest[0] if rest else None
    return Particles(posterior.decode(x), log_w + log_z, {"evaluations": float(posterior.steps)})


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


def twist_log_likelihood(posterior: Posterior, estimate: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
    """log psi_t: how likely y is at an estimate of x_0 (N, B, *shape) with error r_t^2, (N, B). For Gaussian noise of variance sigma^2
    the log-likelihood is flattened by sigma^2 / (sigma^2 + r_t^2), for another noise, or a reward, by 1 - r_t^2 / r_T^2."""
    error = posterior.error(t).mean()
    if isinstance(posterior.problem.noise, GaussianNoise):
        variance = posterior.problem.noise.std.double().square().mean() / posterior.beta
        flatten = variance / (variance + error)
    else:
        flatten = (1 - error / posterior.error(posterior.times[0]).mean()).clamp_min(0)
    return flatten.to(estimate.dtype) * posterior.log_likelihood(estimate, y)


@torch.no_grad()
def renoise_mcmc(
    posterior: Posterior, y: Tensor | None = None, n: int = 64, generator: Generator | None = None, *, sweeps: int = 8, burn_in: int = 0,
    candidates: int = 1, start: Tensor | None = None, chunk_size: int | None = 4096, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""Markov chains on paths that leave p(tau) p(y | x_0)^beta invariant. A sweep makes three moves about a random level k:

        climb       x_{k+1} .. x_K anew from x_k, by the forward process; accepted by p over forward
        bridge      x_1 .. x_{k-1} anew given x_0 and x_k, by the forward process's bridge; accepted by p over bridge
        re-denoise  x_{k-1} .. x_0 anew from x_k by the posterior; accepted by p p(y | x_0)^beta over q

    The first two are always accepted where the prior's chain is the exact reversal. The level is drawn for all chains of a sweep at once,
    evenly up to a highest one: K, unless `burn_in` sweeps adapt it.

    Args:
        posterior: proposal and target.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: chains per observation.
        sweeps: at least 1, after the burn-in.
        burn_in: sweeps that move the highest level until a quarter of the re-denoisings is accepted, or it is K.
        candidates: re-denoisings of each chain and sweep. One is accepted or not; of several, and the path as it is, one is chosen by
            weight (iterated sampling importance resampling; Andrieu, Lee, Vihola 2018, arXiv 1312.6432).
        start: x_0 to start from in the chain's space, (n, B, *shape), noised up by the forward process; by default n draws of the
            posterior, each chosen out of four by its path weight.
        chunk_size: most states in one scoring call.

    Returns:
        Particles(x (n, B, *data_shape), log_w = 0), with info: `acceptance` of the re-denoisings (B,), `level`, the highest one,
        `evaluations` and, from 4 sweeps on, `r_hat` and `effective_draws` (B,) of the sweeps of all chains (`diagnostics.split_r_hat`), of
        8 random projections of x_0: r_hat above 1.01 asks for more sweeps.
    """
    check_count("n", n), check_count("sweeps", sweeps), check_count("burn_in", burn_in, 0), check_count("candidates", candidates)
    y = posterior.check_y(y)
    K, b = posterior.steps, 1 if y is None else len(y)
    if start is None:
        states, evaluations = choose_by_weight(posterior, y, n, generator, chunk_size), 4.0 * K
    else:
        if start.shape != (n, b, *posterior.shape):
            raise ValueError(f"start must have shape (n, B, *shape) = {(n, b, *posterior.shape)}, got {tuple(start.shape)}")
        states, evaluations = renoise(posterior, start, generator), 0.0
    device = None if generator is None else generator.device
    directions = torch.randn((states[-1][0, 0].numel(), 8), generator=generator, device=states.device, dtype=states.dtype)
    highest, accepted, history = float(K), [], []
    for sweep in tqdm(range(burn_in + sweeps), "sweeps", disable=not progress, leave=False):
        level = int(torch.randint(1, round(highest) + 1, (), generator=generator, device=device))
        for move in (climb, bridge):
            proposal, log_ratio = move(posterior, states, level, y, generator, chunk_size)
            if not posterior.prior.exact_reversal:  # else the ratio is one
                uniform = torch.rand((n, b), generator=generator, device=states.device, dtype=states.dtype)
                proposal = choose(uniform.log() < log_ratio(), proposal, states)
            states = proposal
        states, moved = redenoise(posterior, states, level, y, generator, chunk_size, candidates)
        evaluations += (candidates + 1) * level
        if sweep < burn_in:
            highest = min(float(K), max(1.0, highest * math.exp((float(moved.mean()) - 0.25) / (sweep + 1) ** 0.5)))
        else:
            accepted.append(moved.mean(0))
            history.append(states[-1].flatten(2) @ directions)
    x = posterior.decode(states[-1])
    info = {"acceptance": torch.stack(accepted).mean(0), "level": round(highest), "evaluations": evaluations}
    if sweeps >= 4:
        chains = torch.stack(history)
        info |= {"r_hat": split_r_hat(chains), "effective_draws": effective_draws(chains)}
    return Particles(x, x.new_zeros(x.shape[:2]), info)


def refine(
    posterior: Posterior, y: Tensor | None = None, n: int = 64, generator: Generator | None = None, *, rounds: int = 3,
    candidates: int = 3, chunk_size: int | None = 4096, progress: bool = False,
) -> Particles:  # fmt: skip
    """Population refinement: weigh and resample the posterior's draws, then rounds of re-noising all of them and denoising each
    `candidates` times in parallel, of which, and of the draw as it was, one is kept by its exact weight. More rounds are sequential,
    more candidates parallel compute; both approach the posterior from any budget.

    Args:
        rounds: at least 1. The rest as in `renoise_mcmc`, which this is with several candidates.
    """
    check_count("candidates", candidates, 2)
    return renoise_mcmc(
        posterior, y, n, generator, sweeps=check_count("rounds", rounds), candidates=candidates, chunk_size=chunk_size, progress=progress
    )


def choose(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Paths (K + 1, N, B, *shape): new ones where `which` (N, B)."""
    return torch.where(which.reshape(which.shape + (1,) * (new.ndim - 3)), new, old)


def choose_by_weight(posterior: Posterior, y: Tensor | None, n: int, generator: Generator | None, chunk_size: int | None) -> Tensor:
    """Paths (K + 1, n, B, *shape): n out of 4 n of the posterior's, resampled by their weights."""
    paths = rollout(posterior, 4 * n, y, generator)
    index = systematic(path_log_weights(posterior, paths, chunk_size), n, generator)
    return paths.x[:, index, torch.arange(index.shape[1], device=index.device)]


def climb(posterior: Posterior, states: Tensor, level: int, y, generator, chunk_size) -> tuple[Tensor, Callable[[], Tensor]]:
    """The first move: proposed states (K + 1, N, B, *shape), and a function that gives the log of the acceptance ratio, (N, B)."""
    top = posterior.steps - level
    upper = renoise(posterior, states[top], generator, from_level=level)

    def log_w(part):
        log_q = torch.zeros_like(log_p := path_log_prob(posterior.prior, Trajectory(part, posterior.times[: top + 1]), chunk_size))
        for j in range(top):
            a, b = (c.to(part.dtype) for c in posterior.schedule.forward_step(posterior.times[j + 1], posterior.times[j]))
            log_q = log_q + GaussianStep(a * part[j + 1], b, len(posterior.shape)).log_prob(part[j])
        return log_p - log_q

    return torch.cat([upper, states[top + 1 :]]), lambda: log_w(upper) - log_w(states[: top + 1])


def bridge(posterior: Posterior, states: Tensor, level: int, y, generator, chunk_size) -> tuple[Tensor, Callable[[], Tensor]]:
    """The second move."""
    top, x_0, event_dim = posterior.steps - level, states[-1], len(posterior.shape)
    times = posterior.times[top:]
    steps = [tuple(c.to(x_0.dtype) for c in posterior.schedule.reverse_step(t, s, 1.0)) for t, s in pairwise(times[:-1])]
    lower = [states[top]]
    for c_0, c_t, sd in steps:
        lower.append(draw(GaussianStep(c_0 * x_0 + c_t * lower[-1], sd, event_dim), generator))

    def log_w(part):
        log_p = lower_log_prob(posterior.prior, Trajectory(part, times), chunk_size)
        log_q = sum(GaussianStep(c_0 * x_0 + c_t * part[j], sd, event_dim).log_prob(part[j + 1]) for j, (c_0, c_t, sd) in enumerate(steps))
        return log_p - log_q

    part = torch.stack([*lower, x_0])
    return torch.cat([states[:top], part]), lambda: log_w(part) - log_w(states[top:])


def redenoise(
    posterior: Posterior, states: Tensor, level: int, y, generator, chunk_size, candidates: int = 1
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The third move, made: the states, and in which chains they changed, as 0 and 1, (N, B)."""
    top, n = posterior.steps - level, states.shape[1]
    times = posterior.times[top:]
    start = states[top].repeat(candidates, *(1,) * (states.ndim - 2))
    lower = rollout(posterior, candidates * n, y, generator, start=start, level=level)

    def log_w(paths: Trajectory) -> Tensor:
        log_q = lower_log_prob(posterior, paths, chunk_size) if paths.log_prob is None else paths.log_prob
        return lower_log_prob(posterior.prior, paths, chunk_size) + posterior.log_likelihood(paths.x_0, y) - log_q

    new, old = log_w(lower).unflatten(0, (candidates, n)), log_w(Trajectory(states[top:], times, y))
    uniform = torch.rand(old.shape, generator=generator, device=old.device, dtype=old.dtype)
    if candidates == 1:
        pick = (uniform.log() < new[0] - old).long() - 1  # -1: the old one
    else:
        cumulative = torch.cat([old[None], new]).softmax(0).cumsum(0)
        pick = (uniform * cumulative[-1] > cumulative).sum(0).clamp_max(candidates) - 1
    parts = lower.x.unflatten(1, (candidates, n))
    index = pick.clamp_min(0).reshape(1, 1, *pick.shape, *(1,) * len(posterior.shape)).expand(len(parts), 1, *parts.shape[2:])
    chosen = torch.cat([states[:top], parts.gather(1, index)[:, 0]])
    return choose(pick >= 0, chosen, states), (pick >= 0).to(old.dtype)


def lower_log_prob(chain: Chain, path: Trajectory, chunk_size: int | None) -> Tensor:
    """log-density of a path given its first state, (N, B)."""
    return path_log_prob(chain, path, chunk_size) - initial_log_prob(chain, path)
