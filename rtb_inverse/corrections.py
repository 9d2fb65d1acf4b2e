"""Corrections that use the exact path weights."""

from itertools import pairwise

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from rtb_inverse.chains import Chain, Prior, Trajectory, initial_log_prob, path_log_prob, renoise, rollout
from rtb_inverse.checks import check_choice, check_count, check_finite
from rtb_inverse.diagnostics import effective_sample_size, log_mean_weight
from rtb_inverse.distributions import GaussianStep, draw
from rtb_inverse.particles import Particles, systematic
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise


@torch.no_grad()
def importance(
    posterior: Posterior, y: Tensor | None = None, n: int = 256, generator: Generator | None = None, *, batch_size: int | None = None,
    chunk_size: int | None = 4096, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""Path importance sampling: draws with log w = log p(tau) + beta log p(y | x_0) - log q(tau | y).

    The mean weight estimates the evidence without bias (`Particles.log_z`, `log_z_error`), weighted means the posterior's.

    Args:
        posterior: proposal and target.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: draws per observation, at least 1.
        batch_size: most draws per observation rolled out at once; all by default.
        chunk_size: most states in one scoring call.

    Returns:
        Particles(x (n, B, *data_shape), log_w (n, B)).
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
    return Particles(torch.cat(xs), torch.cat(log_ws))


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
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold!r}")
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
        poor = effective_sample_size(log_w) < threshold * n
        if k < posterior.steps - 1 and poor.any():
            index = torch.where(poor, systematic(log_w, n, generator), torch.arange(n, device=x.device)[:, None])
            pick = index, torch.arange(b, device=x.device)
            x, psi = x[pick], psi[pick]
            estimate = None if estimate is None else estimate[pick]
            log_z = log_z + torch.where(poor, log_mean_weight(log_w), torch.zeros_like(log_z))
            log_w = torch.where(poor, torch.zeros_like(log_w), log_w)
    return Particles(posterior.decode(x), log_w + log_z)


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
    posterior: Posterior, y: Tensor | None = None, n: int = 64, generator: Generator | None = None, *, sweeps: int = 8,
    start: Tensor | None = None, chunk_size: int | None = 4096, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""Markov chains on paths that leave p(tau) p(y | x_0)^beta invariant. A sweep makes three moves about a random level k:

        climb       x_{k+1} .. x_K anew from x_k, by the forward process; accepted by p over forward
        bridge      x_1 .. x_{k-1} anew given x_0 and x_k, by the forward process's bridge; accepted by p over bridge
        re-denoise  x_{k-1} .. x_0 anew from x_k by the posterior; accepted by p p(y | x_0)^beta over q

    The first two are always accepted where the prior's chain is the exact reversal. The level is drawn for all chains of a sweep at once.

    Args:
        posterior: proposal and target.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: chains per observation.
        sweeps: at least 1.
        start: x_0 to start from in the chain's space, (n, B, *shape), noised up by the forward process; by default n draws of the
            posterior, each chosen out of four by its path weight.
        chunk_size: most states in one scoring call.

    Returns:
        Particles(x (n, B, *data_shape), log_w = 0).
    """
    check_count("n", n), check_count("sweeps", sweeps)
    y = posterior.check_y(y)
    if start is None:
        states = choose_by_weight(posterior, y, n, generator, chunk_size)
    else:
        b = 1 if y is None else len(y)
        if start.shape != (n, b, *posterior.shape):
            raise ValueError(f"start must have shape (n, B, *shape) = {(n, b, *posterior.shape)}, got {tuple(start.shape)}")
        states = renoise(posterior, start, generator)
    device = None if generator is None else generator.device
    for _ in tqdm(range(sweeps), "sweeps", disable=not progress, leave=False):
        level = int(torch.randint(1, posterior.steps + 1, (), generator=generator, device=device))
        for propose in (climb, bridge, redenoise):
            proposal, log_ratio = propose(posterior, states, level, y, generator, chunk_size)
            uniform = torch.rand(log_ratio.shape, generator=generator, device=log_ratio.device, dtype=log_ratio.dtype)
            accept = uniform.log() < log_ratio
            states = torch.where(accept.reshape(accept.shape + (1,) * len(posterior.shape)), proposal, states)
    x = posterior.decode(states[-1])
    return Particles(x, x.new_zeros(x.shape[:2]))


def choose_by_weight(posterior: Posterior, y: Tensor | None, n: int, generator: Generator | None, chunk_size: int | None) -> Tensor:
    """Paths (K + 1, n, B, *shape): n out of 4 n of the posterior's, resampled by their weights."""
    paths = rollout(posterior, 4 * n, y, generator)
    index = systematic(path_log_weights(posterior, paths, chunk_size), n, generator)
    return paths.x[:, index, torch.arange(index.shape[1], device=index.device)]


def climb(posterior: Posterior, states: Tensor, level: int, y, generator, chunk_size) -> tuple[Tensor, Tensor]:
    """The first move: proposed states (K + 1, N, B, *shape) and the log of the acceptance ratio, (N, B)."""
    top = posterior.steps - level
    upper = renoise(posterior, states[top], generator, from_level=level)

    def log_w(part):
        log_q = torch.zeros_like(log_p := path_log_prob(posterior.prior, Trajectory(part, posterior.times[: top + 1]), chunk_size))
        for j in range(top):
            a, b = (c.to(part.dtype) for c in posterior.schedule.forward_step(posterior.times[j + 1], posterior.times[j]))
            log_q = log_q + GaussianStep(a * part[j + 1], b, len(posterior.shape)).log_prob(part[j])
        return log_p - log_q

    return torch.cat([upper, states[top + 1 :]]), log_w(upper) - log_w(states[: top + 1])


def bridge(posterior: Posterior, states: Tensor, level: int, y, generator, chunk_size) -> tuple[Tensor, Tensor]:
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
    return torch.cat([states[:top], part]), log_w(part) - log_w(states[top:])


def redenoise(posterior: Posterior, states: Tensor, level: int, y, generator, chunk_size) -> tuple[Tensor, Tensor]:
    """The third move."""
    top = posterior.steps - level
    lower = rollout(posterior, states.shape[1], y, generator, start=states[top], level=level)

    def log_w(part):
        path = Trajectory(part, posterior.times[top:], y)
        log_p, log_q = (lower_log_prob(chain, path, chunk_size) for chain in (posterior.prior, posterior))
        return log_p + posterior.log_likelihood(part[-1], y) - log_q

    return torch.cat([states[:top], lower.x]), log_w(lower.x) - log_w(states[top:])


def lower_log_prob(chain: Chain, path: Trajectory, chunk_size: int | None) -> Tensor:
    """log-density of a path given its first state, (N, B)."""
    return path_log_prob(chain, path, chunk_size) - initial_log_prob(chain, path)
