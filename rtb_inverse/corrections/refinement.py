"""Population refinement."""

from torch import Generator, Tensor

from rtb_inverse.checks import check_count
from rtb_inverse.corrections.renoising import renoise_mcmc
from rtb_inverse.particles import Particles
from rtb_inverse.posterior import Posterior


def refine(
    posterior: Posterior, y: Tensor | None = None, n: int = 64, generator: Generator | None = None, *, rounds: int = 3,
    candidates: int = 3, budget: float | None = None, chunk_size: int | None = 4096, progress: bool = False,
) -> Particles:  # fmt: skip
    """Population refinement: weigh and resample the posterior's draws, then rounds of re-noising all of them and denoising each
    `candidates` times in parallel, of which, and of the draw as it was, one is kept by its exact weight. More rounds are sequential,
    more candidates parallel compute; both approach the posterior from any budget.

    Args:
        rounds: at least 1; with a budget, as many as it lasts for.
        candidates: at least 2.
        budget: most network evaluations per draw, at least those of a draw and a sweep at level 1. The rest as in `renoise_mcmc`, which
            this is with several candidates.
    """
    check_count("candidates", candidates, 2), check_count("rounds", rounds)
    return renoise_mcmc(
        posterior, y, n, generator, sweeps=rounds, candidates=candidates, budget=budget, chunk_size=chunk_size, progress=progress
    )
