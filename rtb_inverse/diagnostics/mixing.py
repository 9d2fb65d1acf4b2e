"""Do Markov chains mix, and how many independent draws are they worth?"""

import math

import torch
from scipy import stats
from torch import Tensor

from rtb_inverse.checks import check_tensor


def _split_chains(chains: Tensor) -> Tensor:
    """(S, N, B, *shape) to the halves of each chain, (S // 2, 2 N, B, d) in double precision; the middle sweep of an odd S is left out."""
    if check_tensor("chains", chains).ndim < 3 or len(chains) < 4:
        raise ValueError(f"chains must have shape (S, N, B, *shape) with S at least 4 sweeps, got {tuple(chains.shape)}")
    half = len(chains) // 2
    both = torch.cat([chains[:half], chains[-half:]], 1).double()
    return both.reshape(*both.shape[:3], -1)


def _normal_scores(x: Tensor) -> Tensor:
    """Normal quantiles of the ranks over the first two axes, ties averaged (Blom's offset)."""
    ranks = stats.rankdata(x.flatten(0, 1).cpu().numpy(), axis=0)
    return torch.special.ndtri((torch.as_tensor(ranks, device=x.device) - 0.375) / (len(ranks) + 0.25)).reshape(x.shape)


def _variances(z: Tensor) -> tuple[Tensor, Tensor]:
    """Within chains, and over all: (B, d) each of z (S, N, B, d)."""
    S = len(z)
    within = z.var(0).mean(0)
    return within, within * (S - 1) / S + z.mean(0).var(0)


def _constant(x: Tensor) -> Tensor:
    return (x == x[0, 0]).all(0).all(0)


def split_r_hat(chains: Tensor) -> Tensor:
    """Rank-normalised split R-hat, the larger of bulk and folded, and the largest over elements: (B,). About 1 for mixed chains;
    below 1.01 for chains to be trusted. Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), Bayesian Analysis 16, 667
    (arXiv:1903.08008). An element that never changes in any chain has 1; chains stuck at different values have a very large one.

    Args:
        chains: (S, N, B, *shape), S >= 4 sweeps of N chains for each of B observations, without burn-in.
    """
    x = _split_chains(chains)
    ordered = x.flatten(0, 1).sort(0).values
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    found = []
    for v in (x, (x - median).abs()):
        within, total = _variances(_normal_scores(v))
        found.append(torch.where(_constant(v), 1.0, (total / within).sqrt()))
    return torch.cat(found, 1).max(1).values


def effective_draws(chains: Tensor) -> Tensor:
    """Effective number of independent draws in chains, the smallest over elements: (B,). Bulk effective sample size of Vehtari et al.
    (2021), arXiv:1903.08008, section 3: S N / tau for rank-normalised split chains, with the autocorrelation time tau by Geyer's initial
    monotone sequence (1992, Statistical Science 7, 473). At most S N log10(S N); S N for an element that never changes in any chain.

    Args:
        chains: (S, N, B, *shape), S >= 4 sweeps of N chains for each of B observations, without burn-in.
    """
    x = _split_chains(chains)
    z = _normal_scores(x)
    S, n = len(z), z.shape[0] * z.shape[1]
    within, total = _variances(z)
    spectrum = torch.fft.rfft(z - z.mean(0), 2 * S, dim=0)
    covariance = torch.fft.irfft(spectrum.abs().square(), 2 * S, dim=0)[:S].mean(1) / S  # (S, B, d)
    rho = 1 - (within - covariance) / total
    rho[0] = 1
    pairs = rho[: S // 2 * 2].unflatten(0, (-1, 2)).sum(1)  # of even and odd lags: positive and decreasing for a reversible chain
    pairs = pairs.cummin(0).values.clamp_min(0)
    tau = (2 * pairs.sum(0) - 1).clamp_min(1 / math.log10(n))
    return torch.where(_constant(x), float(n), n / tau).min(1).values
