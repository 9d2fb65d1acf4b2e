r"""Losses and gradients of the posterior's chain, without a framework.

The gradient of any objective of log q (N, B) is a sum over paths and steps of (d loss / d log_q) times the gradient of one step's
log-density. So: roll out and score under `no_grad`, then visit the steps in batched chunks. Memory is that of one chunk, whatever K.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from rtb_inverse.chains import Bridges, Trajectory, chunks, path_log_prob, rollout, step_log_prob
from rtb_inverse.checks import check_finite
from rtb_inverse.objectives import tempered
from rtb_inverse.posterior import Posterior
from rtb_inverse.randomness import generator_on, standard_normal

ROUNDS, COPIES = 2, 4  # of `fit_head`: regressions, and states of each draw at each level
COUNTS = 1 / 3  # of the draws, that their effective sample size is to be
RIDGES = (0.15, 0.5, 1.5, 5.0, 15.0)  # tried, of the features' squares, which are about 1


@torch.no_grad()
def step_weights(posterior: Posterior) -> Tensor:
    r"""Weights of the K steps in a regression, mean 1, (K,): 1 / lambda_t with lambda_t = c_0^2 r_t^2 / (sd^2 + c_0^2 r_t^2), the share
    of a step's variance that comes from not knowing x_0.

    A regression's gradient and its noise grow with lambda_t, which is 1 at the last step, while there is most to learn where it is small,
    early. Each step's minimiser is the same under any weights; these keep the last steps from drowning the first.
    """
    t, s = posterior.times[:-1], posterior.times[1:]
    c_0, _, sd = posterior.schedule.reverse_step(t, s, posterior.prior.eta)
    error = posterior.error(t).flatten(1).mean(1).cpu()
    weights = ((c_0**2 * error) / (sd**2 + c_0**2 * error)).clamp_min(1e-4).reciprocal()
    return weights / weights.mean()


def denoising_loss(posterior: Posterior, bridges: Bridges, y: Tensor | None, weights: Tensor | None = None) -> Tensor:
    r"""Conditional denoising: - K E log q(x_s | x_t, y) over bridges of paths whose end simulated y, a per-path negative log-likelihood
    (up to the constant of x_T) per element of x. Minimised by the exact posterior's steps, projected on Gaussians.

    With x_s integrated out, q's expected log-density is closed and its gradient far less noisy: little of a step's noise is about x_0.

    Args:
        bridges: M transitions. y: (M, *y_shape) or None.
        weights: of the steps, (K,), mean 1; None: all equal.
    """
    times = posterior.times.to(bridges.x_t.device)
    step = posterior.transition(bridges.x_t, times[bridges.k], times[bridges.k + 1], y)
    log_q = step.expected_log_prob(bridges.mean, bridges.sd)
    if weights is not None:
        log_q = weights.to(log_q)[bridges.k] * log_q
    return -log_q.mean() * posterior.steps / bridges.x_t[0].numel()


@torch.no_grad()
def fit_head(
    posterior: Posterior, y: Tensor, n: int = 512, generator: Generator | None = None, chunk_size: int = 1024, progress: bool = False
) -> None:  # fmt: skip
    r"""Fit the posterior's `head` to one y, (1, *y_shape), in place, by ridge regression.

    Of one y, E[x_0 | x_t, y] is a function of x_t alone, and the guided estimate is near it. So n draws of the posterior, picked by their
    path weights, tempered so that a third of them counts, are noised to each level, and what is left of the estimates' errors is
    regressed on what is known there, with the ridge that leaves the least at one half of the draws of what the other half learnt. All but
    the last step; `ROUNDS` times, each time with draws of what was found. Of large x the directions are the draws' principal ones.
    """
    head: Any = posterior.head
    for _ in tqdm(range(ROUNDS), "fitting to the one y", disable=not progress, leave=False):
        paths = rollout(posterior, n, y, generator)
        log_q, log_p, log_lik = score(posterior, paths, chunk_size)
        weights = tempered(log_p + log_lik - log_q, COUNTS)[:, 0].softmax(0)
        picked = torch.multinomial(weights, COPIES * n, replacement=True, generator=generator_on(weights.device, generator))
        x_0 = paths.x_0[picked]
        d, r = head.basis.shape
        if r < d:
            head.basis.copy_(principal(paths.x_0.flatten(1), weights, r))
        found = torch.zeros_like(head.weight)
        head.weight.zero_()
        for k, t in enumerate(posterior.times[:-1].flip(0)[1:], 1):
            noise = standard_normal(x_0, generator)
            x_t = posterior.schedule.add_noise(x_0, noise, t)
            estimate = torch.cat([posterior.denoise(part, t, y)[0] for part in x_t.split(chunk_size)])
            known, error = head.features(x_t, t, estimate).flatten(0, 1).double(), head.within(x_0 - estimate).flatten(0, 1).double()
            found[k] = regress(known, error, picked % 2 == 0)
        head.weight.copy_(found)


def regress(known: Tensor, error: Tensor, half: Tensor) -> Tensor:
    """Ridge regression of error (M, r) on known (M, m), to (m, r): of `RIDGES` that by which one half of the rows (M,) tells most of the
    other half; 0 where none tells anything."""
    halves = [(known[rows], error[rows]) for rows in (half, ~half)]
    squares, products = [k.T @ k for k, _ in halves], [k.T @ e for k, e in halves]

    def solve(square: Tensor, product: Tensor, rows: int, ridge: float) -> Tensor:
        return torch.linalg.solve(square + ridge * max(1, rows) * torch.eye(len(square)).to(square), product)

    def left(ridge: float) -> float:
        """Of the squared error, in the half that was not fitted."""
        maps = [solve(square, product, len(k), ridge) for square, product, (k, _) in zip(squares, products, halves, strict=True)]
        return sum(float((e - k @ found).square().sum()) for (k, e), found in zip(halves, maps[::-1], strict=True))

    losses = {ridge: left(ridge) for ridge in RIDGES}
    best = min(losses, key=losses.__getitem__)
    if losses[best] >= float(error.square().sum()):
        return torch.zeros_like(products[0])
    return solve(squares[0] + squares[1], products[0] + products[1], len(known), best)


def principal(x: Tensor, weights: Tensor, r: int) -> Tensor:
    """The r orthonormal directions in which x (M, d) with weights of sum 1, (M,), vary most, (d, r); zeros beyond M of them."""
    x, weights = x.double(), weights.double()
    directions = torch.linalg.svd((x - weights @ x) * weights.sqrt()[:, None], full_matrices=False).Vh[:r]
    return torch.nn.functional.pad(directions, (0, 0, 0, r - len(directions))).T


@torch.no_grad()
def line_search(parameters: Sequence[Tensor], start: Sequence[Tensor], loss: Callable[[], Tensor | float]) -> float:
    """Put the parameters theta, in place, where the loss is least on the line from `start` to where they are; returns how far along, in
    [0, 1].

    What a regression learns from finitely many examples is part signal, part noise: a step of s along the line keeps s (2 - s) of what
    was to be gained and s^2 of what the noise costs. So the loss is nearly a parabola, and is measured at both ends, in the middle, and at
    the lowest point of the parabola through these; the best of them is taken. It is to be of examples that it was not trained on.
    """
    end = [parameter.detach().clone() for parameter in parameters]

    def put(s: float) -> None:
        for parameter, first, last in zip(parameters, start, end, strict=True):
            parameter.copy_(torch.lerp(first, last, s))

    def at(s: float) -> float:
        put(s)
        return float(loss())

    found = {s: at(s) for s in (0.0, 0.5, 1.0)}
    bend = 2 * (found[0.0] + found[1.0] - 2 * found[0.5])
    lowest = 0.5 - (found[1.0] - found[0.0]) / (2 * bend) if bend > 0 else 0.0
    if 0 < lowest < 1:
        found[lowest] = at(lowest)
    best = min(found, key=found.__getitem__)
    put(best)
    return best


@torch.no_grad()
def score(posterior: Posterior, paths: Trajectory, chunk_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """log q(tau | y), log p(tau), beta log p(y | x_0) of paths, (N, B) each; what the roll-out already scored is not scored again."""
    known = paths.x.new_empty((0, paths.x.shape[2])) if paths.log_prob is None else paths.log_prob
    log_q = known
    if len(known) < paths.x.shape[1]:
        log_q = torch.cat([known, path_log_prob(posterior, paths.draws(slice(len(known), None)), chunk_size)])
    log_p = path_log_prob(posterior.prior, paths, chunk_size)
    return log_q, log_p, check_finite("log-likelihood of the paths", posterior.log_likelihood(paths.x_0, paths.y))


def path_backward(
    posterior: Posterior, paths: Trajectory, log_q: Tensor, loss: Callable[[Tensor], Tensor], *, chunk_size: int | None = None,
    step_fraction: float = 1.0, generator: Generator | None = None,
) -> Tensor:  # fmt: skip
    """Accumulate the gradient of loss(log_q) in the posterior's parameters, chunk by chunk; returns the loss, detached.

    Args:
        paths: the paths that log_q (N, B) scores.
        loss: a function of log_q; what else it depends on (log Z) gets its gradient too.
        chunk_size: most states in one call of the network.
        step_fraction: share in (0, 1] of the steps, drawn at random without replacement, that the gradient visits; the sum is scaled
            up by its inverse, so the gradient is unbiased.
    """
    if not 0 < step_fraction <= 1:
        raise ValueError(f"step_fraction must be in (0, 1], got {step_fraction!r}")
    log_q = log_q.detach().requires_grad_()
    value = loss(log_q)
    value.backward()
    weight, steps, scale = log_q.grad, None, 1.0
    if step_fraction < 1:
        count = max(1, round(step_fraction * paths.steps))
        steps = torch.randperm(paths.steps, generator=generator, device=None if generator is None else generator.device)[:count]
        scale = paths.steps / count
    for k, n in chunks(paths, chunk_size, steps):
        (scale * weight[n] * step_log_prob(posterior, paths, k, n)).sum().backward()
    return value.detach()
