r"""Hamiltonian Monte Carlo for x_0 ~ N(m, C), split so that the prior's part is solved exactly (Beskos et al. 2011,
doi 10.1016/j.spa.2011.06.003). With the velocity v ~ N(0, C), the mass C^{-1}, and l(x) = log p(y | x), a leap of angle e is

    v <- v + e/2 C grad l(x)
    (x - m, v) <- (cos(e) (x - m) + sin(e) v,  cos(e) v - sin(e) (x - m))
    v <- v + e/2 C grad l(x)

and a whole trajectory is accepted by the change of H = -l(x) - log N(x; m, C) - log N(v; 0, C). One leap is the Langevin
algorithm (MALA) in the same metric. N(m, C) may also be a Gaussian near the posterior; l is then log p(x) p(y | x) / N(x; m, C).
"""

import torch
from torch import Generator, Tensor

from rtb_inverse.baselines.markov import draws_of, run_chains
from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_count
from rtb_inverse.particles import Particles
from rtb_inverse.problems import InverseProblem
from rtb_inverse.schedules import expand


@torch.no_grad()
def hmc(
    prior: Prior, problem: InverseProblem, y: Tensor | None = None, n: int = 64, generator: Generator | None = None, *, leaps: int = 8,
    law: str = "prior", steps: int = 100, burn_in: int = 100, step_size: float = 0.05, kept: int = 1, start: Tensor | None = None,
    progress: bool = False,
) -> Particles:  # fmt: skip
    """Hamiltonian Monte Carlo; with leaps = 1 the Metropolis-adjusted Langevin algorithm.

    Args:
        prior: of a Gaussian x_0: `GaussianPrior`, or `GeneratorPrior`.
        problem: with a differentiable operator; bound to the prior's shape here.
        leaps: of a trajectory, at least 1.
        burn_in: trajectories in which each observation's step size is brought to an acceptance of 0.7.
        step_size: the angle e of a leap to start from, in (0, pi / 2].
        y, n, law, steps, kept, start: as of `pcn`; a step is a trajectory.

    Returns:
        As `pcn` does. A gradient counts as one evaluation, together with the value.

    Raises:
        ValueError: bad arguments; a prior whose x_0 is not Gaussian; a law that prior and problem do not have; an operator
            without gradient; a likelihood that is not finite.
    """
    check_count("leaps", leaps)

    def move(q, known, x, values, angle, generator):
        m, e = q.mean, expand(angle, x[0])

        def energy(x, v, ratio):
            return -ratio - q.log_prob(x) - q.log_prob(m + v)

        v, force = draws_of(q, x.shape[:2], generator) - m, values[1]
        before = energy(x, v, values[0])
        for _ in range(leaps):
            v = v + e / 2 * force
            x, v = m + e.cos() * (x - m) + e.sin() * v, e.cos() * v - e.sin() * (x - m)
            ratio, force = known(x)
            v = v + e / 2 * force
        return x, (ratio, force), before - energy(x, v, ratio)

    return run_chains(
        "hmc", prior, problem, y, n, generator, move=move, gradient=True, goal=0.7, cost=leaps, law=law, steps=steps,
        burn_in=burn_in, step_size=step_size, kept=kept, start=start, progress=progress,
    )  # fmt: skip
