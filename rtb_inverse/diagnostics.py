r"""How good draws are: pure functions of tensors, each with a standard error where it is an average over observations.

N draws for each of B observations: draws (N, B, *shape), truth (B, *shape), log-weights (N, B),

    log w = log p(tau) + beta log p(y | x_0) - log q(tau | y).

Calibration: if the truths were drawn from the prior, the observations from the truths and the draws from p(x | y), then any number
computed from a truth ranks uniformly among the same numbers computed from its N draws. Draws are unweighted here (resample first) and
independent of each other (thin chains first).

Every function raises TypeError or ValueError for an argument that is no floating-point tensor, has the wrong shape, is empty or holds NaN
or infinity (of a log-weight: NaN or +infinity); what a function asks beyond that is under its own "Raises".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy import stats
from torch import Generator, Tensor
from torch.nn.functional import conv2d

from rtb_inverse.checks import check_count, check_positive, check_tensor

ELEMENTS = 32  # `sbc_ranks` takes every element up to so many, and so many random projections of more
LEAST_OBSERVATIONS = 10  # of a test over observations: two bins of expected count 5


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error (NaN for a single value)."""

    value: float
    error: float

    @staticmethod
    def of(values: Tensor) -> "Estimate":
        """Mean of independent values and its standard error."""
        values = values.double().flatten()
        error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
        return Estimate(float(values.mean()), error)

    def __str__(self) -> str:
        return f"{self.value:.3g} ± {self.error:.2g}"


# Arguments


def _check_draws(name: str, draws: Tensor, least: int = 1) -> Tensor:
    """`draws` if it is finite, of shape (N, B, *shape) and N is at least `least`."""
    if check_tensor(name, draws).ndim < 2:
        raise ValueError(f"{name} must have shape (N, B, *shape), got {tuple(draws.shape)}")
    if len(draws) < least:
        raise ValueError(f"{name} must have shape (N, B, *shape) with at least {least} draws, got {tuple(draws.shape)}")
    return draws


def _check_pair(draws: Tensor, truth: Tensor, least: int = 1, observations: int = 1) -> None:
    """Draws (N, B, *shape) and a truth (B, *shape) that match, with N and B at least so many."""
    _check_draws("draws", draws, least)
    if check_tensor("truth", truth).shape != draws.shape[1:]:
        raise ValueError(f"truth must have the shape (B, *shape) of the draws, {tuple(draws.shape[1:])}, got {tuple(truth.shape)}")
    _check_observations("draws", draws.shape[1], observations)


def _check_observations(name: str, B: int, least: int) -> None:
    if B < least:
        raise ValueError(f"{name} must hold at least {least} observations for a test over observations, got B = {B}")


def _check_alike(name: str, x: Tensor, other: str, y: Tensor) -> None:
    if check_tensor(name, x).shape != check_tensor(other, y).shape:
        raise ValueError(f"{name} and {other} must have the same shape, got {tuple(x.shape)} and {tuple(y.shape)}")


def _check_log_w(log_w: Tensor) -> Tensor:
    """`log_w` if it holds neither NaN nor +infinity; -infinity is the weight 0."""
    if not isinstance(log_w, Tensor) or not log_w.is_floating_point():
        raise TypeError(f"log_w must be a floating-point torch.Tensor, got {getattr(log_w, 'dtype', type(log_w).__name__)}")
    if log_w.ndim == 0 or log_w.numel() == 0:
        raise ValueError(f"log_w must have shape (N, B) with at least one draw and one observation, got {tuple(log_w.shape)}")
    bad = log_w.isnan() | log_w.isposinf()
    if bad.any():
        raise ValueError(f"log_w must be below infinity and not NaN, got NaN or +infinity in {int(bad.sum())} of {bad.numel()} elements")
    return log_w


# Evidence and weights


def elbo(log_w: Tensor) -> Tensor:
    """E_q log w, a lower bound of log Z(y): (N, B) weights of on-policy paths to (B,)."""
    return _check_log_w(log_w).mean(0)


def eubo(log_w: Tensor) -> Tensor:
    """E_p(tau | y) log w, an upper bound of log Z(y): (N, B) weights of paths of the posterior itself, such as a prior roll-out for the y
    that was simulated from its end; to (B,)."""
    return _check_log_w(log_w).mean(0)


def effective_sample_size(log_w: Tensor) -> Tensor:
    """Kish's effective sample size over N, in [1, N]: (B,). It is 0 where every weight is 0 (every log-weight -inf)."""
    total = _check_log_w(log_w).logsumexp(0)
    return torch.where(total.isneginf(), 0.0, (2 * total - (2 * log_w).logsumexp(0)).exp())


def log_mean_weight(log_w: Tensor) -> Tensor:
    """Importance-sampled log Z(y): (N, B) to (B,). It is -inf where every weight is 0 (every log-weight -inf)."""
    return _check_log_w(log_w).logsumexp(0) - math.log(len(log_w))


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
    if _check_log_w(log_w).ndim != 2:
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


# Calibration


def interval_coverage(draws: Tensor, truth: Tensor, level: float) -> Tensor:
    """Share of elements of the truth (B, *shape) inside the central interval of that level of the draws (N, B, *shape): (B,).
    With N draws, the interval between order statistics is exact for its own level, floor-rounded to a multiple of 2 / (N + 1).
    It sees shifted, narrow and wide draws and most missing modes, element by element; a shift can hide behind draws too wide, and what
    happens between the two quantiles, or jointly between elements, is not seen.

    Raises:
        ValueError: for a level outside (0, 1).
    """
    _check_pair(draws, truth)
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
    u = torch.rand(ties.shape, generator=generator, device=ties.device, dtype=torch.float64)
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
    _check_pair(draws, truth)
    both = torch.cat([truth[None], draws])
    if statistics is None:
        values = both.flatten(2) if both.ndim > 2 else both[..., None]
        if values.shape[-1] > ELEMENTS:
            values = values @ _directions(values, ELEMENTS, generator)
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
    _check_observations("ranks", B, LEAST_OBSERVATIONS)
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
    _check_pair(draws, truth, observations=LEAST_OBSERVATIONS)
    N, B = draws.shape[:2]
    if references is None:
        order = torch.randperm(B, generator=generator, device=truth.device)
        references = torch.empty_like(truth)
        references[order] = truth[order.roll(1)]  # one cycle through all observations: no truth is its own reference
    _check_alike("references", references, "truth", truth)
    distance = (torch.cat([truth[None], draws]) - references).reshape(N + 1, B, -1).norm(dim=-1)
    rank = _rank(distance[1:], distance[0], generator)
    k = torch.arange(N + 2, device=rank.device)
    coverage = (rank[None] < k[:, None]).double().mean(1)
    u = (rank + torch.rand(B, generator=generator, device=rank.device, dtype=torch.float64)) / (N + 1)
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
    T = _check_draws("residual", residual).double().square().reshape(*residual.shape[:2], -1)
    m = T.shape[-1]
    T = T.sum(-1)
    return ChiSquared(T.mean(0) / m, torch.special.gammaincc(torch.full_like(T, m / 2), T / 2).mean(0))


# Distance between two sets of draws


def _directions(x: Tensor, n: int, generator: Generator | None) -> Tensor:
    """n random unit vectors of the last axis of x, as columns."""
    theta = torch.randn((x.shape[-1], n), generator=generator, device=x.device, dtype=x.dtype)
    return theta / theta.norm(dim=0)


def _flat(x: Tensor) -> Tensor:
    """(N, d) or (N, B, *shape) to (N, B, d), B = 1 for the first."""
    return x.reshape(len(x), x.shape[1] if x.ndim > 2 else 1, -1)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 128, generator: Generator | None = None) -> Tensor:
    """Sliced 2-Wasserstein distance between two sets of equally many draws, x and y (N, d) or (N, B, *shape) with a common
    batch; root mean square over random directions, in the units of x: a number, or (B,). It sees every defect, but is above 0 for two
    sets of one law as well: compare with the distance between two such sets.

    Args:
        directions: how many random directions to project on.
    """
    _check_alike("x", x, "y", y)
    check_count("directions", directions)
    batched = x.ndim > 2
    x, y = _flat(x), _flat(y)
    theta = _directions(x, directions, generator)
    distance = ((x @ theta).sort(0).values - (y @ theta).sort(0).values).square().mean((0, 2)).sqrt()
    return distance if batched else distance[0]


def energy_distance(x: Tensor, y: Tensor, chunk_size: int = 2**24) -> Tensor:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'| between two sets of draws, in the units of x; 0 for one law and above 0 for any
    two. Szekely and Rizzo (2013), J. Stat. Plan. Inference 143, 1249. This is the unbiased estimate, over pairs of different draws: it can
    be below 0, and `Estimate.of` it over observations has mean 0 where the laws agree. It sees every defect.

    Args:
        x: (N, d), or (N, B, *shape).
        y: (M, d), or (M, B, *shape) with the same B and shape.
        chunk_size: most distances held at once (at least B times the larger of N and M).

    Returns:
        A number, or (B,).

    Raises:
        ValueError: for fewer than 2 draws in a set.
    """
    _check_draws("x", x, 2)
    if _check_draws("y", y, 2).shape[1:] != x.shape[1:]:
        raise ValueError(f"x and y must have the same shape after the draws, got {tuple(x.shape)} and {tuple(y.shape)}")
    check_count("chunk_size", chunk_size)
    batched = x.ndim > 2
    x, y = (_flat(v).transpose(0, 1).contiguous() for v in (x, y))  # (B, N, d)
    N, M = x.shape[1], y.shape[1]

    def total(x: Tensor, y: Tensor) -> Tensor:
        parts = x.split(max(1, chunk_size // (len(y) * y.shape[1])), 1)
        # by matrix products a distance of 0 would come out as rounding
        sums = [torch.cdist(part, y, compute_mode="donot_use_mm_for_euclid_dist").sum((1, 2), dtype=torch.float64) for part in parts]
        return torch.stack(sums).sum(0)

    distance = (2 * total(x, y) / (N * M) - total(x, x) / (N * (N - 1)) - total(y, y) / (M * (M - 1))).to(x.dtype)
    return distance if batched else distance[0]


def classifier_two_sample_test(x: Tensor, y: Tensor, folds: int = 5, classifier=None, generator: Generator | None = None) -> Estimate:
    """Cross-validated accuracy of a classifier that tells x from y: 0.5 for one law, up to 1. Lopez-Paz and Oquab (2017), arXiv:1610.06545.

    It sees whatever its classifier can learn from so many draws; nearest neighbours lose power as elements grow in number. All draws must
    be independent: a truth and a draw that share their y are not, jointly with y.

    Args:
        x: (N, *shape) draws of one law.
        y: (N, *shape) draws of the other.
        folds: J, of the cross-validation.
        classifier: a scikit-learn classifier, which sees standardised elements. Default: floor(sqrt(n)) nearest neighbours, for n points
            of training. Give a random one its own `random_state`.

    Returns:
        The accuracy, and its standard error by 1 / 4, the variance of a guess, and the factor 1 + J / (J - 1) for the overlap of the
        folds (Nadeau and Bengio 2003, Machine Learning 52, 239), which errs on the large side: (value - 0.5) / error of the
        default classifier is above 3 in less than one in 1,000 comparisons of a law with itself.

    Raises:
        ValueError: for fewer than 2 draws per fold, or fewer than 2 folds.
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    _check_alike("x", x, "y", y)
    N = len(x)
    if N < 2 * check_count("folds", folds, 2):
        raise ValueError(f"x and y must hold at least 2 draws per fold, {2 * folds}, got {N}")
    features = torch.cat([x, y]).reshape(2 * N, -1).double().cpu().numpy()
    labels = (torch.arange(2 * N) >= N).numpy()
    classifier = classifier or KNeighborsClassifier(math.isqrt(2 * (N - math.ceil(N / folds))))
    seed = int(torch.randint(2**31, (1,), generator=generator, device=generator.device if generator else None))
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    guess = cross_val_predict(make_pipeline(StandardScaler(), classifier), features, labels, cv=splits)
    return Estimate(float((guess == labels).mean()), math.sqrt((1 + folds / (folds - 1)) / (8 * N)))


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """Half of the absolute differences of two vectors of probabilities, (..., J)."""
    return (p - q).abs().sum(-1) / 2


# Distance to the truth


def psnr(estimate: Tensor, truth: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of (B, *shape) against the truth: (B,)."""
    _check_alike("estimate", estimate, "truth", truth)
    check_positive("data_range", data_range)
    error = (estimate - truth).square().reshape(len(truth), -1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(estimate: Tensor, truth: Tensor, data_range: float = 2.0) -> Tensor:
    """Mean structural similarity of images (B, C, H, W), (B,), in [-1, 1], 1 for equal images. Wang, Bovik, Sheikh and Simoncelli (2004),
    IEEE Trans. Image Process. 13, 600: K_1 = 0.01, K_2 = 0.03, Gaussian window of 11 x 11 pixels and standard deviation 1.5, each channel
    alone, averaged over the places where the window lies inside the image. For images below 11 pixels the window is the largest odd one
    that fits, with its standard deviation in proportion.

    Args:
        data_range: largest minus smallest possible value.

    Raises:
        ValueError: for an image below 3 pixels.
    """
    _check_alike("estimate", estimate, "truth", truth)
    check_positive("data_range", data_range)
    if truth.ndim != 4 or min(truth.shape[2:]) < 3:
        raise ValueError(f"truth must have shape (B, C, H, W) with H and W at least 3, got {tuple(truth.shape)}")
    C, side = truth.shape[1], min(truth.shape[2:])
    radius = min(5, (side - 1) // 2)
    offset = torch.arange(-radius, radius + 1, device=truth.device, dtype=torch.float64) / (0.3 * radius)
    window = torch.exp(-(offset**2) / 2)
    window = window[:, None] * window / window.sum() ** 2
    x, y = estimate.double(), truth.double()

    def local(v: Tensor) -> Tensor:
        return conv2d(v, window.expand(C, 1, -1, -1), groups=C)

    mean_x, mean_y = local(x), local(y)
    var_x, var_y, cov = local(x * x) - mean_x**2, local(y * y) - mean_y**2, local(x * y) - mean_x * mean_y
    c_1, c_2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c_1) * (2 * cov + c_2) / ((mean_x**2 + mean_y**2 + c_1) * (var_x + var_y + c_2))
    return similarity.flatten(1).mean(1).to(truth.dtype)


def crps(draws: Tensor, truth: Tensor) -> Tensor:
    """Continuous ranked probability score E|x - x*| - E|x - x'| / 2, averaged over elements: (B,), in the units of x, lower is better and
    lowest in the mean for draws of the posterior. Gneiting and Raftery (2007), JASA 102, 359; unbiased in N ("fair": Ferro 2014,
    Q. J. R. Meteorol. Soc. 140, 1917). It sees elements only, not what they do jointly.

    Args:
        draws: (N, B, *shape), at least 2.
        truth: (B, *shape).
    """
    _check_pair(draws, truth, 2)
    N, B = draws.shape[:2]
    error = (draws - truth).reshape(N, B, -1)
    weight = 2 * torch.arange(1, N + 1, device=error.device, dtype=error.dtype) - N - 1
    pairs = torch.einsum("n,nbd->bd", weight, error.sort(0).values)  # sum over i < j of |x_i - x_j|
    return (error.abs().mean(0) - pairs / (N * (N - 1))).mean(1)


# Chains


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
