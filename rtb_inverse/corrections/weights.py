"""What the corrections share: the weights of paths and of draws, and the budget."""

import torch
from torch import Generator, Tensor

from rtb_inverse.chains import Trajectory, path_log_prob
from rtb_inverse.checks import check_positive
from rtb_inverse.particles import Particles, check_below_infinity, systematic
from rtb_inverse.posterior import Posterior


def log_likelihood(posterior: Posterior, x_0: Tensor, y: Tensor | None) -> Tensor:
    """beta log p(y | x_0), (N, B); -inf is allowed, NaN and +inf are not."""
    return check_below_infinity("log-likelihood of the draws", posterior.log_likelihood(x_0, y))


def path_log_weights(posterior: Posterior, paths: Trajectory, chunk_size: int | None) -> Tensor:
    """log p(tau) + beta log p(y | x_0) - log q(tau | y) of the posterior's own paths, (N, B)."""
    log_w = log_likelihood(posterior, paths.x_0, paths.y) + path_log_prob(posterior.prior, paths, chunk_size) - paths.log_prob
    return check_below_infinity("weights of the paths", log_w)


def runs_within(budget: float | None, method: str, posterior: Posterior) -> int:
    """How many whole runs a draw may cost, 1 without a budget."""
    if budget is None:
        return 1
    return int(check_budget(budget, f"one run of {method}", posterior.evaluations()) // posterior.evaluations())


def check_budget(budget: float, run: str, least: int) -> float:
    """The budget if it is a finite number of at least `least`, which one such run needs; raise ValueError otherwise."""
    if check_positive("budget", budget) < least:
        raise ValueError(f"budget must be at least {least} network evaluations per draw, for {run}, got {budget!r}")
    return float(budget)


def thin(proposals: Particles, n: int, generator: Generator | None) -> Particles:
    """n draws of more, resampled by weight. Their weights are all the mean of the old ones, so that log_z stays what it was; info says its
    error, and the effective sample size `ess` of the proposals."""
    index = systematic(proposals.log_w, n, generator)
    x = proposals.x[index, torch.arange(index.shape[1], device=index.device)]
    info = {**proposals.info, "log_z_error": proposals.log_z_error, "ess": proposals.ess}
    return Particles(x, proposals.log_z.expand(n, -1).clone(), info)
