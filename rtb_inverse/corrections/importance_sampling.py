"""Path importance sampling."""

import torch
from torch import Generator, Tensor

from rtb_inverse.chains import rollout
from rtb_inverse.checks import check_count
from rtb_inverse.corrections.weights import path_log_weights, runs_within, thin
from rtb_inverse.diagnostics import pareto_smooth
from rtb_inverse.particles import Particles, check_possible
from rtb_inverse.posterior import Posterior, check_posterior


@torch.no_grad()
def importance(
    posterior: Posterior, y: Tensor | None = None, n: int = 256, generator: Generator | None = None, *, budget: float | None = None,
    batch_size: int | None = None, smooth: bool = False, chunk_size: int | None = 4096, progress: bool = False,
) -> Particles:  # fmt: skip
    r"""Path importance sampling: draws with log w = log p(tau) + beta log p(y | x_0) - log q(tau | y).

    The mean weight estimates the evidence without bias (`Particles.log_z`, `log_z_error`), weighted means the posterior's.

    Args:
        posterior: proposal and target.
        y: observations, (B, *y_shape); None for a `Reward`.
        n: draws per observation, at least 1. A single one has an ESS of 1, and a `log_z_error` and `k_hat` of inf: it cannot know them.
        budget: most network evaluations per draw, at least those of one proposal: as many of these as it lasts for, of which n are
            resampled by their weights; log_w is then log_z for all.
        batch_size: most draws per observation rolled out at once; all by default.
        smooth: Pareto-smooth the weights (`diagnostics.pareto_smooth`): less variance, a little bias.
        chunk_size: most states in one scoring call.

    Returns:
        Particles(x (n, B, *data_shape), log_w (n, B)), with info `evaluations` and `k_hat` (B,), the Pareto shape of the largest weights:
        above 0.7 the weighted means and log_z are not to be trusted (inf too where there are too few draws to tell); with a budget also
        `ess` (B,), of the proposals.

    Raises:
        ValueError: bad arguments; a likelihood of NaN or +inf; an observation all of whose draws have a likelihood of 0.
    """
    check_posterior(posterior), check_count("n", n)
    if batch_size is not None:
        check_count("batch_size", batch_size)
    runs, y = runs_within(budget, "importance", posterior), posterior.check_y(y)
    xs, log_ws = [], []
    for start in range(0, runs * n, batch_size or runs * n):
        paths = rollout(posterior, min(batch_size or runs * n, runs * n - start), y, generator, progress=progress)
        log_ws.append(path_log_weights(posterior, paths, chunk_size))
        xs.append(posterior.decode(paths.x_0))
    log_w = check_possible("weights of the paths", torch.cat(log_ws))
    smoothed, k_hat = pareto_smooth(log_w)
    info = {"evaluations": float(runs * posterior.evaluations()), "k_hat": k_hat}
    draws = Particles(torch.cat(xs), smoothed if smooth else log_w, info)
    return draws if budget is None else thin(draws, n, generator)
