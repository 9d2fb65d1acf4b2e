r"""What Markov chains under a Gaussian prior x_0 ~ N(m, C) share: `pcn` and `hmc`. Each is exact in the limit, and slow to get there.

`GaussianPrior` has such an x_0, and `GeneratorPrior`, whose x_0 is the z of x = f(z). A chain moves by a Gaussian law q that it would leave
as it is, and is kept to the posterior by l(x) = log p(x) p(y | x) / q(x). With q = p that is the log-likelihood, whatever the dimension.
With the Laplace approximation of the posterior, z ~ N(z*, (I + J^T J)^{-1}) (see `laplace`; Rudolf and Sprungk 2018, arXiv 1504.03461), l
varies little, and a step may be long where y says much. Its standard deviations are taken `WIDER` times as large, so that q has the tails.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from rtb_inverse.baselines.common import check_differentiable, prepare
from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_choice, check_count, check_tensor
from rtb_inverse.diagnostics import effective_draws, split_r_hat
from rtb_inverse.distributions import GaussianStep
from rtb_inverse.laplace import laplace_guidance
from rtb_inverse.particles import Particles, check_below_infinity, check_possible
from rtb_inverse.problems import InverseProblem
from rtb_inverse.randomness import standard_normal, uniform

LONGEST = math.pi / 2  # of a step, as an angle: then nothing is left of the state it came from
WIDER = 1.15


def gaussian_law(method: str, prior: Prior) -> GaussianStep:
    """p(x_0), or ValueError where it is not Gaussian."""
    law = getattr(prior, "distribution", None)
    if not isinstance(law, GaussianStep) or law.batch_shape:
        raise ValueError(
            f"prior must have a Gaussian x_0 for {method}, as GaussianPrior and GeneratorPrior have, got {type(prior).__name__}"
        )
    return law


def law_of(which: str, own: GaussianStep, prior: Prior, problem: InverseProblem, y: Tensor | None) -> GaussianStep:
    """q: `own`, the prior's, or for "laplace" that of each observation."""
    if check_choice("law", which, ("prior", "laplace")) == "prior":
        return own
    guide = None if y is None else laplace_guidance(problem, prior, 1.0)
    if guide is None:
        raise ValueError(
            "law='laplace' needs a prior x_0 ~ N(0, I), such as GeneratorPrior, of differentiable decode, and an observation of few "
            "elements by a differentiable operator and a noise model of rtb_inverse.noise; expected law='prior' here"
        )
    return guide.law(y, WIDER)


def draws_of(q: GaussianStep, batch: torch.Size, generator: Generator | None) -> Tensor:
    """Of each chain (n, B) a draw of q, whose own batch is () or (B,)."""
    return q.sample(batch[: 2 - len(q.batch_shape)], generator)


def run_chains(
    method: str, prior: Prior, problem: InverseProblem, y: Tensor | None, n: int, generator: Generator | None, *, move: Callable,
    gradient: bool, goal: float, cost: int, law: str, steps: int, burn_in: int, step_size: float, kept: int, start: Tensor | None,
    progress: bool,
) -> Particles:  # fmt: skip
    """n chains for each observation, all at once.

    Args:
        move: (q, known, x, values, angle, generator) to a proposal (n, B, *shape), the values there, and the log of the acceptance ratio
            (n, B); q of batch () or (B,). `known` gives the values of a state: l (n, B) and, with `gradient`, its gradient times the
            covariance of q; they are kept with the state. `angle` (B,) is the step size.
        goal: acceptance that the burn-in brings each observation's step size to.
        cost: evaluations of the likelihood in a move.
    """
    y, own = prepare(prior, problem, y), gaussian_law(method, prior)
    check_count("n", n), check_count("steps", steps), check_count("burn_in", burn_in, 0), check_count("kept", kept)
    if kept > steps:
        raise ValueError(f"kept must be at most steps = {steps}, got {kept!r}")
    if not 0 < step_size <= LONGEST:
        raise ValueError(f"step_size must be in (0, pi / 2], got {step_size!r}")
    q = law_of(law, own, prior, problem, y)
    if gradient:
        check_differentiable(method, problem, prior)
    shape = (n, 1 if y is None else len(y), *prior.shape)
    x = draws_of(q, torch.Size(shape[:2]), generator) if start is None else check_tensor("start", start).to(**prior._options())
    if x.shape != shape:
        raise ValueError(f"start must have shape (n, B, *shape) = {shape}, got {tuple(x.shape)}")

    def known(x_0: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(gradient):
            x_0 = x_0.detach().requires_grad_(gradient)
            ratio = check_below_infinity("log-likelihood", problem.log_likelihood(prior.decode(x_0), y))
            if q is not own:
                ratio = ratio + own.log_prob(x_0) - q.log_prob(x_0)
            if not gradient:
                return (ratio,)
            return ratio.detach(), q.times_covariance(torch.autograd.grad(ratio.sum(), x_0)[0])

    def choose(accept: Tensor, new: Tensor, old: Tensor) -> Tensor:
        return torch.where(accept.reshape(accept.shape + (1,) * (new.ndim - 2)), new, old)

    values, angle = known(x), x.new_full(shape[1:2], step_size)
    directions = standard_normal(x, generator, (x[0, 0].numel(), 8))
    keep = {burn_in + round((i + 1) * steps / kept) - 1 for i in range(kept)}
    accepted, draws, log_w, history = torch.zeros_like(angle), [], [], []
    for k in tqdm(range(burn_in + steps), method, disable=not progress, leave=False):
        proposal, others, log_ratio = move(q, known, x, values, angle, generator)
        accept = (uniform(shape[:2], x, generator).log() < log_ratio) | values[0].isneginf()  # out of where y is impossible, by any way
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
