r"""The covariance of the denoiser's error at the very state, by a second evaluation of the network.

Let b be the slope of log p(y | x_0) at the estimate that y has moved. Then p(x_0 | x_t) exp(b . x_0), normalised, is the law of x_0 at
another state, x_t + n with n = (sigma_t^2 / alpha_t) b; so to first order y moves the estimate by

    C(x_t) b,      C(x_t) = Cov[x_0 | x_t] = (sigma_t^2 / alpha_t) d x0hat / d x_t      (Tweedie's second formula),

and the difference of two estimates says it without a derivative of the network:

    C(x_t) b  ~  (x0hat(x_t + e n) - x0hat(x_t)) / e,      e n as large as `NUDGE` sigma_t, or n if that is smaller.

A guide by the average covariance finds b and moves by C_t b; with a share w of C(x_t) in its place, by (1 - w) C_t b + w C(x_t) b. One
network's derivative at one state is noisy: w is `SHARE` at most, and the move is bounded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from rtb_inverse.guidance import clipped
from rtb_inverse.schedules import Schedule, expand

SHARE = 0.4
FIRST, LAST = 0.5, 0.95  # levels alpha / sqrt(alpha^2 + sigma^2) between which it pays: before, y says little; after, the average will do
NUDGE = 0.3  # of sigma_t
BOUND = 2.0  # of the denoiser's error


def shares(schedule: Schedule, times: Tensor) -> Tensor:
    """w at the times that steps start from: 0 where no second look is taken."""
    alpha, sigma = schedule.alpha_sigma(times)
    level = alpha / torch.hypot(alpha, sigma)
    return SHARE * level * ((level > FIRST) & (level < LAST))


def local_move(
    estimate: Callable[[Tensor], Tensor], x_t: Tensor, x_0: Tensor, slope: Tensor, error: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """C(x_t) b, bounded softly.

    Args:
        estimate: x0hat as a function of x_t. x_t, x_0: states and estimates there, (M, *shape).
        slope: b, (M, *shape). error: r_t^2, (M, *shape). alpha, sigma: (M,).
    """
    n = expand(sigma**2 / alpha, slope) * slope
    length = n.square().flatten(1).mean(1).clamp_min(torch.finfo(n.dtype).tiny).sqrt()
    e = expand((NUDGE * sigma.to(n) / length).clamp(max=1.0), n)
    return clipped((estimate(x_t + e * n) - x_0) / e, error, BOUND, n.ndim - 1)
