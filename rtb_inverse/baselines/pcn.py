r"""The preconditioned Crank-Nicolson chain (Cotter, Roberts, Stuart, White 2013, arXiv 1202.0709) for x_0 ~ N(m, C):

    x' = m + cos(a) (x - m) + sin(a) (xi - m),      xi ~ N(m, C),

which leaves the prior as it is, so that the ratio of likelihoods alone decides whether x' is taken, in any number of dimensions. In the
place of the prior's the law may be that of a Gaussian near the posterior (Rudolf and Sprungk 2018, arXiv 1504.03461).
"""

import torch
from torch import Generator, Tensor

from rtb_inverse.baselines.markov import draws_of, run_chains
from rtb_inverse.chains import Prior
from rtb_inverse.particles import Particles
from rtb_inverse.problems import InverseProblem
from rtb_inverse.schedules import expand


@torch.no_grad()
def pcn(
    prior: Prior, problem: InverseProblem, y: Tensor | None = None, n: int = 64, generator: Generator | None = None, *,
    law: str = "prior", steps: int = 1000, burn_in: int = 1000, step_size: float = 0.1, kept: int = 1, start: Tensor | None = None,
    progress: bool = False,
) -> Particles:  # fmt: skip
    """Preconditioned Crank-Nicolson.

    Args:
        prior: of a Gaussian x_0: `GaussianPrior`, or `GeneratorPrior`.
        problem: any likelihood, differentiable or not; bound to the prior's shape here.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: chains for each observation.
        law: the Gaussian N(m, C): "prior", or "laplace", the Laplace approximation of the posterior, a little wider: where y says much, far
            longer steps. For priors x_0 ~ N(0, I), such as `GeneratorPrior`, and few-element observations by a smooth operator.
        steps: of each chain, after the burn-in.
        burn_in: steps in which each observation's step size is brought to an acceptance of a quarter.
        step_size: the angle a to start from, in (0, pi / 2].
        kept: states of each chain that are returned, at equal distances over the steps.
        start: x_0 in the chain's space, (n, B, *shape); by default draws of the law.

    Returns:
        Particles(x (kept n, B, *data_shape), log_w = 0, but -inf where a chain has found no x that y allows), with info: `acceptance`,
        `step_size` (B,), `evaluations` of the likelihood for each draw, `r_hat` and `effective_draws` (B,) of all steps of all chains, of
        8 random projections of x_0.

    Raises:
        ValueError: bad arguments; a prior whose x_0 is not Gaussian; a law that prior and problem do not have; a likelihood of NaN or
            +inf.
    """

    def move(q, known, x, values, angle, generator):
        a = expand(angle, x[0])
        proposal = q.mean + a.cos() * (x - q.mean) + a.sin() * (draws_of(q, x.shape[:2], generator) - q.mean)
        others = known(proposal)
        return proposal, others, others[0] - values[0]

    return run_chains(
        "pcn", prior, problem, y, n, generator, move=move, gradient=False, goal=0.25, cost=1, law=law, steps=steps,
        burn_in=burn_in, step_size=step_size, kept=kept, start=start, progress=progress,
    )  # fmt: skip
