r"""Evidence and weights: of log w = log p(tau) + beta log p(y | x_0) - log q(tau | y), (N, B).

E_q log w <= log Z(y) = log E_q w <= E_p(tau | y) log w, with equality where q is the posterior: then every weight is Z(y).
"""

import math

import torch
from torch import Tensor

from rtb_inverse.diagnostics.common import check_log_w


def elbo(log_w: Tensor) -> Tensor:
    """E_q log w, a lower bound of log Z(y): (N, B) weights of on-policy paths to (B,)."""
    return check_log_w(log_w).mean(0)


def eubo(log_w: Tensor) -> Tensor:
    """E_p(tau | y) log w, an upper bound of log Z(y): (N, B) weights of paths of the posterior itself, such as a prior roll-out for the y
    that was simulated from its end; to (B,)."""
    return check_log_w(log_w).mean(0)


def effective_sample_size(log_w: Tensor) -> Tensor:
    """Kish's effective sample size over N, in [1, N]: (B,). It is 0 where every weight is 0 (every log-weight -inf).
    It sees shifted, narrow and wide draws; a mode that no draw is in leaves it as it was."""
    total = check_log_w(log_w).logsumexp(0)
    return torch.where(total.isneginf(), 0.0, (2 * total - (2 * log_w).logsumexp(0)).exp())


def log_mean_weight(log_w: Tensor) -> Tensor:
    """Importance-sampled log Z(y): (N, B) to (B,). It is -inf where every weight is 0 (every log-weight -inf). The weights make
    up for shifted and wide draws, and nearly for narrow ones; a missing mode is missing in it."""
    return check_log_w(log_w).logsumexp(0) - math.log(len(log_w))


def fit_generalised_pareto(x: Tensor, n: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Shape k and scale sigma of the generalised Pareto density (1 + k x / sigma)^(-1 / k - 1) / sigma, by the quasi-Bayesian estimate of
    Zhang and Stephens (2009), Technometrics 51, 316.

    Args:
        x: (M, B) exceedances of a threshold, positive, in descending order for each of B samples.
        n: (B,) how many leading rows belong to each sample, at least 1, the others being 0; default all M.

    Returns:
        k and sigma, (B,) each in double precision; k > 0 is a heavy tail without its moments above 1 / k, k < 0 a bounded one. The error
        of k is about (1 + k) / sqrt(n).
    """
    M, B = x.shape
    x = x.double()
    n = torch.full((B,), M, device=x.device) if n is None else n
    quartile = x.gather(0, (n - (n / 4 + 0.5).long().clamp_min(1))[None])[0]
    m = 30 + math.isqrt(M)
    grid = torch.arange(1, m + 1, device=x.device, dtype=x.dtype)[:, None]
    theta = 1 / x[0] + (1 - (m / (grid - 0.5)).sqrt()) / (3 * quartile)  # (m, B)

    def shape(theta: Tensor) -> Tensor:
        return torch.log1p(-theta * x).sum(0) / n  # rows of 0 add nothing

    k = torch.stack([shape(row) for row in theta])
    profile = n * (torch.log(-theta / k) - k - 1)
    theta = (profile.softmax(0) * theta).sum(0)
    k = shape(theta)
    return k, -k / theta


def pareto_smooth(log_w: Tensor) -> tuple[Tensor, Tensor]:
    """Pareto-smoothed importance weights: the largest M = ceil(min(N / 5, 3 sqrt(N))) weights become the expected order statistics of a
    generalised Pareto law fitted to them, none above the largest raw weight. Vehtari, Simpson, Gelman, Yao and Gabry (2024), JMLR 25
    (arXiv:1507.02646), with that paper's weak prior on the shape, worth 10 tail weights at k = 1/2.

    Args:
        log_w: (N, B), up to a constant; -inf is the weight 0.

    Returns:
        The smoothed log-weights (N, B), on the scale of the raw ones, and khat (B,), the shape of the tail. Estimates by importance
        sampling are trustworthy below about min(1 - 1 / log10 N, 0.7). Where fewer than 5 weights stand above the rest (N <= 20, or
        nearly all weights 0), nothing can be fitted: the weights come back as they were, with khat = inf. Where the largest M + 1 weights
        are equal up to rounding the tail is bounded and there is nothing to smooth: khat = -inf.

    Raises:
        ValueError: where all log-weights of an observation are -inf.
    """
    if check_log_w(log_w).ndim != 2:
        raise ValueError(f"log_w must have shape (N, B), got {tuple(log_w.shape)}")
    dead = log_w.isneginf().all(0).nonzero().flatten().tolist()
    if dead:
        raise ValueError(f"log_w must have a weight above 0 for every observation, got -inf alone for {dead[:10]} of {log_w.shape[1]}")
    N, B = log_w.shape
    M = math.ceil(min(N / 5, 3 * math.sqrt(N)))
    if M < 5:
        return log_w.clone(), log_w.new_full((B,), math.inf)
    largest = log_w.max(0).values.double()
    top = log_w.topk(M + 1, 0)
    tail = top.values.double() - largest
    cut = tail[-1].clamp_min(math.log(torch.finfo(tail.dtype).tiny) / 2)  # what is further below the largest weight is 0
    rounding = 8 * torch.finfo(log_w.dtype).eps * largest.abs().clamp_min(1)
    x = cut.exp() * torch.expm1(tail[:-1] - cut).clamp_min(0) * (cut < -rounding)
    n = (x > 0).sum(0)
    fit = n >= 5
    # columns that cannot be fitted go through as five ones, and are not used
    k, sigma = fit_generalised_pareto(torch.where(fit, x, torch.arange(M, device=x.device)[:, None] < 5), n.clamp_min(5))
    k = (n * k + 5) / (n + 10)
    rank = torch.arange(M, device=x.device)[:, None]
    log_tail = torch.log((rank + 0.5) / n)  # log of the share of the tail above that rank
    smooth = (sigma * torch.expm1(-k * log_tail) / k + cut.exp()).log().clamp_max(0)
    smooth = torch.where(fit & (rank < n), smooth, tail[:-1]) + largest
    khat = torch.where(fit, k, torch.where(cut < -rounding, math.inf, -math.inf))
    return log_w.scatter(0, top.indices[:-1], smooth.to(log_w.dtype)), khat.to(log_w.dtype)
