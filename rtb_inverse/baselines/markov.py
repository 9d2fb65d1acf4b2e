r"""What Markov chains under a Gaussian prior x_0 ~ N(m, C) share: `pcn` and `hmc`. Each is exact in the limit, and slow to get there.

`GaussianPrior` has such an x_0, and `GeneratorPrior`, whose x_0 is the z of x = f(z).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from rtb_inverse.baselines.common import check_differentiable, prepare
from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_count, check_tensor
from rtb_inverse.diagnostics import effective_draws, split_r_hat
from rtb_inverse.distributions import GaussianStep
from rtb_inverse.particles import Particles, check_below_infinity, check_possible
from rtb_inverse.problems import InverseProblem

LONGEST = math.pi / 2  # of a step, as an angle: then nothing is left of the state it came from


def gaussian_law(method: str, prior: Prior) -> GaussianStep:
    """p(x_0), or ValueError where it is not Gaussian."""
    law = getattr(prior, "distribution", None)
    if not isinstance(law, GaussianStep) or law.batch_shape:
        raise ValueError(
            f"prior must have a Gaussian x_0 for {method}, as GaussianPrior and GeneratorPrior have, got {type(prior).__name__}"
        )
    return law


def run_chains(
    method: str, prior: Prior, problem: InverseProblem, y: Tensor | None, n: int, generator: Generator | None, *, move: Callable,
    gradient: bool, goal: float, cost: int, steps: int, burn_in: int, step_size: float, kept: int, start: Tensor | None, progress: bool,
) -> Particles:  # fmt: skip
    """n chains for each observation, all at once.

    Args:
        move: (law, known, x, values, angle, generator) to a proposal (n, B, *shape), the values there, and the log of the acceptance
            ratio (n, B). `known` gives the values of a state: its log-likelihood (n, B) and, with `gradient`, C times the gradient of that;
            they are kept with the state. `angle` (B,) is the step size.
        goal: acceptance that the burn-in brings each observation's step size to.
        cost: evaluations of the likelihood in a move.
    """
    check_count("n", n), check_count("steps", steps), check_count("burn_in", burn_in, 0), check_count("kept", kept)
    if kept > steps:
        raise ValueError(f"kept must be at most steps = {steps}, got {kept!r}")
    if not 0 < step_size <= LONGEST:
        raise ValueError(f"step_size must be in (0, pi / 2], got {step_size!r}")
    y, law = prepare(prior, problem, y), gaussian_law(method, prior)
    if gradient:
        check_differentiable(method, problem, prior)
    shape = (n, 1 if y is None else len(y), *prior.shape)
    x = law.sample(shape[:2], generator) if start is None else check_tensor("start", start).to(**prior._options())
    if x.shape != shape:
        raise ValueError(f"start must have shape (n, B, *shape) = {shape}, got {tuple(x.shape)}")

    def known(x_0: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(gradient):
            x_0 = x_0.detach().requires_grad_(gradient)
            log_lik = check_below_infinity("log-likelihood", problem.log_likelihood(prior.decode(x_0), y))
            if not gradient:
                return (log_lik,)
            return log_lik.detach(), law.times_covariance(torch.autograd.grad(log_lik.sum(), x_0)[0])

    def choose(accept: Tensor, new: Tensor, old: Tensor) -> Tensor:
        return torch.where(accept.reshape(accept.shape + (1,) * (new.ndim - 2)), new, old)

    values, angle = known(x), x.new_full(shape[1:2], step_size)
    directions = torch.randn((x[0, 0].numel(), 8), generator=generator, device=x.device, dtype=x.dtype)
    keep = {burn_in + round((i + 1) * steps / kept) - 1 for i in range(kept)}
    accepted, draws, log_w, history = torch.zeros_like(angle), [], [], []
    for k in tqdm(range(burn_in + steps), method, disable=not progress, leave=False):
        proposal, others, log_ratio = move(law, known, x, values, angle, generator)
        uniform = torch.rand(shape[:2], generator=generator, device=x.device, dtype=x.dtype)
        accept = (uniform.log() < log_ratio) | values[0].isneginf()  # out of where y is impossible, by any way
        x = choose(accept, proposal, x)
        values = tuple(choose(accept, new, old) for new, old in zip(others, values, strict=True))
        share = accept.to(x.dtype).mean(0)
        if k < burn_in:
            angle = (angle * ((share - goal) / (k + 1) ** 0.5).exp()).clamp_max(LONGEST)
        else:
            accepted += share / steps
            history.append(x.flatten(2) @ directions)
        if k in keep:
            draws.append(x)
            log_w.append(torch.zeros_like(values[0]).masked_fill(values[0].isneginf(), -math.inf))
    info: dict[str, Any] = {"acceptance": accepted, "step_size": angle, "evaluations": cost * (burn_in + steps) / kept}
    if len(history) >= 4:
        chains = torch.stack(history)
        info |= {"r_hat": split_r_hat(chains), "effective_draws": effective_draws(chains)}
    with torch.no_grad():
        x = prior.decode(torch.cat(draws))
    return Particles(x, check_possible("log-likelihood of the chains", torch.cat(log_w)), info)
