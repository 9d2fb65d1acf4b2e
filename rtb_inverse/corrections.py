"""Corrections that use the exact path weights."""

import torch
from torch import Generator, Tensor

from rtb_inverse.chains import path_log_prob, rollout
from rtb_inverse.checks import check_count
from rtb_inverse.particles import Particles
from rtb_inverse.posterior import Posterior


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
        log_p = path_log_prob(posterior.prior, paths, chunk_size)
        log_ws.append(log_p + posterior.log_likelihood(paths.x_0, y) - paths.log_prob)
        xs.append(posterior.decode(paths.x_0))
    return Particles(torch.cat(xs), torch.cat(log_ws))
