r"""Objectives as pure functions of log-densities of paths, (N, B): N paths for each of B observations.

RTB asks that log Z(y) + log q(tau | y) = log p(tau) + beta log p(y | x_0) on every path. Below `log_lik` stands for the last term,
beta included. Every loss is differentiable in `log_q` (and `log_z`); the gradient in the parameters is then
sum (d loss / d log_q) d log_q, summed over paths and steps in chunks (`training.path_backward`), whatever the loss.
"""

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from rtb_inverse.diagnostics import effective_sample_size


def _check_paths(log_q: Tensor, **others: Tensor) -> None:
    """Raise ValueError where log_q is not (N, B), or another of another shape: nothing here may broadcast."""
    for name, value in {"log_q": log_q, **others}.items():
        if value.ndim != 2 or value.shape != log_q.shape:
            raise ValueError(f"{name} must have shape (N, B), as log_q, {tuple(log_q.shape)}, got {tuple(value.shape)}")


def residual(log_q: Tensor, log_p: Tensor, log_lik: Tensor, log_z: Tensor) -> Tensor:
    """The RTB residual log Z + log q - log p - log lik, (N, B); log_z is (B,). Zero on all paths at the exact posterior."""
    _check_paths(log_q, log_p=log_p, log_lik=log_lik)
    if log_z.shape != log_q.shape[1:]:
        raise ValueError(f"log_z must have shape (B,), {tuple(log_q.shape[1:])}, got {tuple(log_z.shape)}")
    return log_z[None, :] + log_q - log_p - log_lik


def half_square(r: Tensor, clip: float | None = None) -> Tensor:
    """mean r^2 / 2; where `clip` is given, Huber's loss: the gradient of one path is clipped to [-clip, clip].

    At the start the residuals can be hundreds of nats while their differences carry the signal; clipping bounds the step that such a
    path takes and moves no zero of the loss, but it weighs far paths less: leave it off to test a gradient.
    """
    return r.square().mean() / 2 if clip is None else huber_loss(r, torch.zeros_like(r), delta=clip)


def rtb(log_q: Tensor, log_p: Tensor, log_lik: Tensor, log_z: Tensor, clip: float | None = None) -> Tensor:
    """Relative Trajectory Balance (Venkatraman et al. 2024, arXiv 2405.20971, eq. 8) with a learned log Z(y), (B,)."""
    return half_square(residual(log_q, log_p, log_lik, log_z), clip)


def vargrad(log_q: Tensor, log_p: Tensor, log_lik: Tensor, clip: float | None = None) -> Tensor:
    """VarGrad (Richter et al. 2020, arXiv 2010.10436): RTB with log Z(y) estimated from the N >= 2 paths of each y, as the value that
    minimises the squares; half of the variance of the residuals within each y."""
    _check_paths(log_q, log_p=log_p, log_lik=log_lik)
    if len(log_q) < 2:
        raise ValueError(f"vargrad needs at least 2 paths per observation, got {len(log_q)}")
    return half_square(residual(log_q, log_p, log_lik, group_log_z(log_q, log_p, log_lik)), clip)


def group_log_z(log_q: Tensor, log_p: Tensor, log_lik: Tensor) -> Tensor:
    """The estimate of log Z(y) by which the residuals of each y have mean zero, (B,), detached."""
    return (log_p + log_lik - log_q).mean(0).detach()


def wake_sleep(log_q: Tensor, log_w: Tensor) -> Tensor:
    """Reweighted wake-sleep (Bornschein and Bengio 2015, arXiv 1406.2751): - sum_n softmax(log_w)_n log_q_n, mean over y. log_w are the
    exact log-weights log p + log lik - log (density that drew the path); they are not differentiated."""
    _check_paths(log_q, log_w=log_w)
    return -(log_w.detach().softmax(0) * log_q).sum(0).mean()


def conditional_denoising(log_q: Tensor) -> Tensor:
    """- mean log q over paths that come from the posterior itself (simulated pairs noised forward): maximum likelihood."""
    return -log_q.mean()


def tempered(log_w: Tensor, least: float) -> Tensor:
    """a log_w, (N, B), finite, with the largest a in [0, 1] for each y that leaves an effective sample size of `least` N: weights so uneven
    that a few draws are all there is move a population towards them, not onto them. Where the draws follow the target log_w is constant
    and a is 1."""

    def enough(a: Tensor) -> Tensor:
        return effective_sample_size(a * log_w) >= least * len(log_w)

    low, high = torch.zeros_like(log_w[0]), torch.ones_like(log_w[0])
    low = torch.where(enough(high), high, low)
    for _ in range(30):  # bisection
        middle = (low + high) / 2
        low, high = torch.where(enough(middle), middle, low), torch.where(enough(middle), high, middle)
    return low * log_w
