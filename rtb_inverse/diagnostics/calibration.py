"""Calibration: does the truth lie among the draws as one more draw would, and do the draws explain y as well as its noise does?"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy import stats
from torch import Generator, Tensor

from rtb_inverse.checks import check_count
from rtb_inverse.diagnostics.common import check_alike, check_draws, check_observations, check_pair, random_directions
from rtb_inverse.randomness import generator_on, uniform

ELEMENTS = 32  # `sbc_ranks` takes every element up to so many, and so many random projections of more
LEAST_OBSERVATIONS = 10  # of a test over observations: two bins of expected count 5


def interval_coverage(draws: Tensor, truth: Tensor, level: float) -> Tensor:
    """Share of elements of the truth (B, *shape) inside the central interval of that level of the draws (N, B, *shape): (B,).
    With N draws, the interval between order statistics is exact for its own level, floor-rounded to a multiple of 2 / (N + 1).
    It sees shifted, narrow and wide draws and most missing modes, element by element; a shift can hide behind draws too wide, and what
    happens between the two quantiles, or jointly between elements, is not seen.

    Raises:
        ValueError: for a level outside (0, 1).
    """
    check_pair(draws, truth)
    if not 0 < level < 1:
        raise ValueError(f"level must be above 0 and below 1, got {level!r}")
    n = len(draws)
    skip = max(1, math.floor((1 - level) / 2 * (n + 1) + 1e-9))
    ordered = draws.sort(0).values
    inside = (truth >= ordered[skip - 1]) & (truth <= ordered[n - skip])
    return inside.reshape(len(truth), -1).double().mean(1)


def interval_level(n: int, level: float) -> float:
    """The level that `interval_coverage` truly has with n draws."""
    return 1 - 2 * max(1, math.floor((1 - level) / 2 * (n + 1) + 1e-9)) / (n + 1)


def _rank(values: Tensor, truth: Tensor, generator: Generator | None) -> Tensor:
    """How many of the values (N, ...) are below the truth (...), in 0 ... N; ties are broken at random."""
    ties = (values == truth).sum(0)
    u = uniform(ties.shape, ties, generator, torch.float64)
    return (values < truth).sum(0) + (u * (ties + 1)).long()


def sbc_ranks(
    draws: Tensor, truth: Tensor, statistics: Sequence[Callable[[Tensor], Tensor]] | None = None, generator: Generator | None = None
) -> Tensor:
    """Simulation-based calibration: the rank of a statistic of the truth among those of the draws, uniform on 0 ... N where the draws are
    the posterior's. Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv:1804.06788.

    It sees shifted, narrow, wide draws and missing modes, in the statistics given. It does not see what these leave out (elements see no
    correlation), nor draws that ignore y: those of the prior are calibrated. A statistic that also looks at y, such as log p(y | x), does.

    Args:
        draws: (N, B, *shape).
        truth: (B, *shape).
        statistics: each takes x (M, B, *shape) to (M, B), for any M; column b belongs to observation b. Default: every element, or
            32 projections on random directions where there are more elements.

    Returns:
        (B, n_statistics), integers in 0 ... N.
    """
    check_pair(draws, truth)
    both = torch.cat([truth[None], draws])
    if statistics is None:
        values = both.flatten(2) if both.ndim > 2 else both[..., None]
        if values.shape[-1] > ELEMENTS:
            values = values @ random_directions(values, ELEMENTS, generator)
    else:
        values = torch.stack([statistic(both) for statistic in statistics], -1)
        if values.shape[:2] != both.shape[:2] or values.ndim != 3:
            raise ValueError(f"statistics must take {tuple(both.shape)} to {tuple(both.shape[:2])}, got {tuple(values.shape[:-1])}")
    return _rank(values[1:], values[0], generator)


def rank_uniformity(ranks: Tensor, n: int) -> Tensor:
    """p-value, for each statistic, of Pearson's chi-squared test that ranks are uniform on 0 ... n. The n + 1 ranks are cut in order into
    J = min(n + 1, 20, B // 5) bins, rank r into bin floor(r J / (n + 1)); bins may hold one rank more or less, and each expected count is
    exact for its own. For several statistics multiply the smallest p-value by their number.

    Args:
        ranks: (B, n_statistics), from `sbc_ranks` with n draws, of independent observations.
        n: number of draws.

    Raises:
        ValueError: for fewer than 10 observations, or a rank outside 0 ... n.
    """
    check_count("n", n)
    if not isinstance(ranks, Tensor) or ranks.is_floating_point() or ranks.ndim != 2:
        raise ValueError(f"ranks must be an integer tensor (B, n_statistics), got {getattr(ranks, 'shape', type(ranks).__name__)}")
    B = len(ranks)
    check_observations("ranks", B, LEAST_OBSERVATIONS)
    if ranks.min() < 0 or ranks.max() > n:
        raise ValueError(f"ranks must be in 0 ... n = {n}, got {int(ranks.min())} to {int(ranks.max())}")
    J = min(n + 1, 20, B // 5)
    bins = torch.arange(J, device=ranks.device)[:, None, None]
    observed = (ranks * J // (n + 1) == bins).sum(1)  # (J, n_statistics)
    expected = (torch.arange(n + 1, device=ranks.device) * J // (n + 1)).bincount().double() * B / (n + 1)
    test = stats.chisquare(observed.double().cpu().numpy(), expected.cpu().numpy()[:, None], axis=0)
    return torch.as_tensor(test.pvalue, device=ranks.device)


class Coverage(NamedTuple):
    """What `tarp` found.

    Attributes:
        levels: (N + 2,) credibility levels k / (N + 1).
        coverage: (N + 2,) share of truths inside the credible region of that level; equals `levels` in the mean where calibrated.
        p_value: of the Kolmogorov-Smirnov test of calibration.
    """

    levels: Tensor
    coverage: Tensor
    p_value: float


def tarp(draws: Tensor, truth: Tensor, references: Tensor | None = None, generator: Generator | None = None) -> Coverage:
    """Expected coverage by distance to reference points (TARP): the credible region of level alpha is the ball around a reference that
    holds the share alpha of the draws. Lemos, Coogan, Hezaveh and Perreault-Levasseur (2023), arXiv:2302.03026.

    The number r of draws closer to the reference than the truth is uniform on 0 ... N under calibration. Null of the test: (r + V) /
    (N + 1), V uniform on [0, 1] to undo the discreteness, is exactly uniform and independent over observations.

    It sees shifted, narrow and wide draws and missing modes, jointly over elements; with the references independent of y it does not
    see draws that ignore y, and shift and width can cancel.

    Args:
        draws: (N, B, *shape).
        truth: (B, *shape).
        references: (B, *shape), not chosen by looking at truth or draws (but y may be). Default: each observation takes the truth of
            another one, so that they lie where the data are; the paper draws them from a box.

    Raises:
        ValueError: for fewer than 10 observations.
    """
    check_pair(draws, truth, observations=LEAST_OBSERVATIONS)
    N, B = draws.shape[:2]
    if references is None:
        order = torch.randperm(B, generator=generator_on(truth.device, generator), device=truth.device)
        references = torch.empty_like(truth)
        references[order] = truth[order.roll(1)]  # one cycle through all observations: no truth is its own reference
    check_alike("references", references, "truth", truth)
    distance = (torch.cat([truth[None], draws]) - references).reshape(N + 1, B, -1).norm(dim=-1)
    rank = _rank(distance[1:], distance[0], generator)
    k = torch.arange(N + 2, device=rank.device)
    coverage = (rank[None] < k[:, None]).double().mean(1)
    u = (rank + uniform(B, rank, generator, torch.float64)) / (N + 1)
    return Coverage(k / (N + 1), coverage, float(stats.kstest(u.cpu().numpy(), "uniform").pvalue))


class ChiSquared(NamedTuple):
    """What `chi_squared` found: `reduced` and `p_value`, (B,) each."""

    reduced: Tensor
    p_value: Tensor


def chi_squared(residual: Tensor) -> ChiSquared:
    """Posterior predictive check of Gaussian noise by the discrepancy T(y, x) = |y - A(x)|^2 / sigma^2. Gelman, Meng and Stern (1996),
    Statistica Sinica 6, 733.

    Args:
        residual: (N, B, *y_shape), (y - A(x)) / sigma of draws x, in units of the noise's standard deviation.

    Returns:
        reduced: (B,) T / m for m elements of y, averaged over the draws. Over observations of the model its mean is 1 for draws of the
            posterior; more for shifted or wide draws, less for draws that follow the noise or are too narrow.
        p_value: (B,) share of replicated y at least as far from the draws, P(chi^2_m >= T), averaged over the draws: near 0 the draws do
            not explain y, near 1 they follow its noise. With N = 1 it is uniform over observations of the model; with more draws it is
            closer to 1/2 than uniform, at most twice as often below a small alpha (Meng 1994, Ann. Statist. 22, 1142).

    Defects in what y does not constrain are not seen: a missing mode that explains y as well as the others, or any law over its null space.
    """
    T = check_draws("residual", residual).double().square().reshape(*residual.shape[:2], -1)
    m = T.shape[-1]
    T = T.sum(-1)
    return ChiSquared(T.mean(0) / m, torch.special.gammaincc(torch.full_like(T, m / 2), T / 2).mean(0))
