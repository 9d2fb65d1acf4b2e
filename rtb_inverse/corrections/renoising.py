"""Re-noising Markov chains on paths."""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from rtb_inverse.chains import Chain, Trajectory, path_log_prob, renoise, rollout
from rtb_inverse.checks import check_count, check_tensor
from rtb_inverse.corrections.weights import check_budget, log_likelihood, path_log_weights
from rtb_inverse.diagnostics import effective_draws, split_r_hat
from rtb_inverse.distributions import GaussianStep, draw
from rtb_inverse.particles import Particles, check_below_infinity, check_possible, systematic
from rtb_inverse.posterior import Posterior, check_posterior
from rtb_inverse.randomness import standard_normal, uniform

POOL = 4  # times as many draws as the starts that are resampled out of them
GOAL = 0.25  # acceptance that the burn-in aims at


@torch.no_grad()
def renoise_mcmc(
    posterior: Posterior, y: Tensor | None = None, n: int = 64, generator: Generator | None = None, *, sweeps: int = 8, burn_in: int = 0,
    candidates: int = 1, start: Tensor | None = None, budget: float | None = None, chunk_size: int | None = 4096, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""Markov chains on paths that leave p(tau) p(y | x_0)^beta invariant. A sweep makes three moves about a random level k:

        climb       x_{k+1} .. x_K anew from x_k, by the forward process; accepted by p over forward
        bridge      x_1 .. x_{k-1} anew given x_0 and x_k, by the forward process's bridge; accepted by p over bridge
        re-denoise  x_{k-1} .. x_0 anew from x_k by the posterior; accepted by p p(y | x_0)^beta over q

    The first two are always accepted where the prior's chain is the exact reversal. The level is drawn for all chains of a sweep at once,
    evenly up to a highest one: K, unless `burn_in` sweeps adapt it. A sweep costs candidates + 1 times the network evaluations of a draw
    from level k.

    Args:
        posterior: proposal and target.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: chains per observation, at least 1.
        sweeps: at least 1, after the burn-in; with a budget, as many as it lasts for.
        burn_in: sweeps that move the highest level until a quarter of the re-denoisings is accepted, or it is K.
        candidates: re-denoisings of each chain and sweep. One is accepted or not; of several, and the path as it is, one is chosen by
            weight (iterated sampling importance resampling; Andrieu, Lee, Vihola 2018, arXiv 1312.6432).
        start: x_0 to start from in the chain's space, (n, B, *shape), noised up by the forward process; by default n draws of the
            posterior, resampled by their path weights out of four times as many.
        budget: most network evaluations per draw, start and burn-in included; at least those of burn_in + 1 sweeps at level 1, and of a
            draw without a start. At most half of it goes to the start, one draw at least: out of four times as many draws, or fewer; the
            levels of the last sweeps are those that still fit.
        chunk_size: most states in one scoring call.

    Returns:
        Particles(x (n, B, *data_shape), log_w = 0, but -inf for chains that started at a likelihood of 0 and found no other), with info:
        `acceptance` of the re-denoisings (B,), `forward_acceptance` of climbs and bridges (B,), `level`, the highest one, `sweeps`,
        `evaluations` and, from 4 sweeps on, `r_hat` and `effective_draws` (B,) of the sweeps of all chains (`diagnostics.split_r_hat`), of
        8 random projections of x_0: r_hat above 1.01 asks for more sweeps.

    Raises:
        ValueError: bad arguments; a likelihood of NaN or +inf; an observation all of whose draws have a likelihood of 0.
    """
    check_posterior(posterior), check_count("n", n), check_count("sweeps", sweeps), check_count("burn_in", burn_in, 0)
    check_count("candidates", candidates)
    y = posterior.check_y(y)
    K, b = posterior.steps, 1 if y is None else len(y)
    costs = [(candidates + 1) * posterior.evaluations(level) for level in range(K + 1)]  # of a sweep
    least, one = costs[1], posterior.evaluations()
    pool = 0 if start is not None else POOL
    if budget is not None:
        need = f"{'' if pool == 0 else 'a start and '}{burn_in} + 1 sweeps at level 1, candidates = {candidates}"
        check_budget(budget, need, (0 if pool == 0 else one) + (burn_in + 1) * least)
        pool = min(pool, max(1, int(budget // (2 * one))))
    states = (
        choose_by_weight(posterior, y, n, generator, chunk_size, pool) if start is None else climb_from(posterior, start, n, b, generator)
    )
    device = None if generator is None else generator.device
    directions = standard_normal(states, generator, (states[-1][0, 0].numel(), 8))
    evaluations, highest = float(pool * one), float(K)
    accepted: list[Tensor] = []
    history: list[Tensor] = []
    for done in tqdm(count(), "sweeps", total=None if budget else burn_in + sweeps, disable=not progress, leave=False):
        top = round(highest)
        if budget is not None:
            left = budget - evaluations - least * max(0, burn_in - done)
            top = min(top, bisect_right(costs, left) - 1)
        if top < 1 or (budget is None and done == burn_in + sweeps):
            break
        level = int(torch.randint(1, top + 1, (), generator=generator, device=device))
        states, moved = sweep(posterior, states, level, y, generator, chunk_size, candidates)
        evaluations += costs[level]
        if done < burn_in:
            highest = min(float(K), max(1.0, highest * math.exp((float(moved[-1].mean()) - GOAL) / (done + 1) ** 0.5)))
        else:
            accepted.append(moved.mean(1))
            history.append(states[-1].flatten(2) @ directions)
    share = torch.stack(accepted).mean(0)
    info: dict[str, Any] = {
        "acceptance": share[-1],
        "forward_acceptance": share[:-1].mean(0),
        "level": round(highest),
        "sweeps": len(history),
    }
    info["evaluations"] = evaluations
    if len(history) >= 4:
        chains = torch.stack(history)
        info |= {"r_hat": split_r_hat(chains), "effective_draws": effective_draws(chains)}
    outside = log_likelihood(posterior, states[-1], y).isneginf()
    log_w = states.new_zeros((n, b)).masked_fill(outside, -math.inf)
    return Particles(posterior.decode(states[-1]), check_possible("log-likelihood of the chains", log_w), info)


def climb_from(posterior: Posterior, start: Tensor, n: int, b: int, generator: Generator | None) -> Tensor:
    """Paths (K + 1, n, B, *shape) from given x_0 up."""
    shape = (n, b, *posterior.shape)
    if isinstance(start, Tensor) and start.shape != shape:
        raise ValueError(f"start must have shape (n, B, *shape) = {shape}, got {tuple(start.shape)}")
    return renoise(posterior, check_tensor("start", start).to(posterior.gate.device, posterior.gate.dtype), generator)


def sweep(
    posterior: Posterior, states: Tensor, level: int, y: Tensor | None, generator: Generator | None, chunk_size: int | None = None,
    candidates: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The three moves about one level: the states (K + 1, N, B, *shape), and which chains took them, as 0 and 1, (3, N, B)."""
    taken = []
    for move in (climb, bridge):
        proposal, log_ratio = move(posterior, states, level, y, generator, chunk_size)
        accept = torch.ones(states.shape[1:3], dtype=torch.bool, device=states.device)
        if not posterior.prior.exact_reversal:  # else the ratio is one
            accept = uniform(accept.shape, states, generator).log() < log_ratio()
        states = choose(accept, proposal, states)
        taken.append(accept.to(states.dtype))
    states, moved = redenoise(posterior, states, level, y, generator, chunk_size, candidates)
    return states, torch.stack([*taken, moved])


def choose(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Paths (K + 1, N, B, *shape): new ones where `which` (N, B)."""
    return torch.where(which.reshape(which.shape + (1,) * (new.ndim - 3)), new, old)


def choose_by_weight(
    posterior: Posterior, y: Tensor | None, n: int, generator: Generator | None, chunk_size: int | None, pool: int
) -> Tensor:  # fmt: skip
    """Paths (K + 1, n, B, *shape): n out of pool * n of the posterior's, resampled by their weights."""
    paths = rollout(posterior, pool * n, y, generator)
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
        log_w = log_likelihood(posterior, paths.x_0, y) + lower_log_prob(posterior.prior, paths, chunk_size) - log_q
        return check_below_infinity("weights of the paths", log_w)

    new, old = log_w(lower).unflatten(0, (candidates, n)), log_w(Trajectory(states[top:], times, y))
    u = uniform(old.shape, old, generator)
    if candidates == 1:
        pick = ((u.log() < new[0] - old) & ~new[0].isneginf()).long() - 1  # -1: the old one
    else:
        both = torch.cat([old[None], new])
        cumulative = both.where(~both.isneginf().all(0), 0.0).softmax(0).cumsum(0)  # from outside to outside: any
        pick = (u * cumulative[-1] > cumulative).sum(0).clamp_max(candidates) - 1
    parts = lower.x.unflatten(1, (candidates, n))
    index = pick.clamp_min(0).reshape(1, 1, *pick.shape, *(1,) * len(posterior.shape)).expand(len(parts), 1, *parts.shape[2:])
    chosen = torch.cat([states[:top], parts.gather(1, index)[:, 0]])
    return choose(pick >= 0, chosen, states), (pick >= 0).to(old.dtype)


def lower_log_prob(chain: Chain, path: Trajectory, chunk_size: int | None) -> Tensor:
    """log-density of a path given its first state, (N, B)."""
    return path_log_prob(chain, replace(path, given_start=True), chunk_size)
