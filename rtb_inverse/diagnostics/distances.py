"""Distances between two sets of draws, of one law or of two."""

import math

import scipy.stats
import torch
from torch import Generator, Tensor

from rtb_inverse.checks import check_count
from rtb_inverse.diagnostics.common import Estimate, check_alike, check_draws, random_directions


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
    check_alike("x", x, "y", y)
    check_count("directions", directions)
    batched = x.ndim > 2
    x, y = _flat(x), _flat(y)
    theta = random_directions(x, directions, generator)
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
    check_draws("x", x, 2)
    if check_draws("y", y, 2).shape[1:] != x.shape[1:]:
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

    check_alike("x", x, "y", y)
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


def clustered_p_value(shares: Tensor, known: Tensor) -> float:
    """Chi-squared test of the mean of shares (B, J), found in B independent runs, against known (J,), both of sum 1. Draws of one run may
    depend on each other: Pearson's statistic is divided by the mean design effect, which the runs' variance tells (Rao and Scott 1981),
    and is then F-distributed with J - 1 and (B - 1) (J - 1) degrees of freedom.

    Raises:
        ValueError: fewer than 2 runs.
    """
    B, J = shares.shape
    if B < 2:
        raise ValueError(f"shares must be those of 2 runs at least, got {B}")
    statistic = B * ((shares.mean(0) - known).square() / known).sum() / (shares.var(0) / known).sum()
    return float(scipy.stats.f.sf(float(statistic), J - 1, (B - 1) * (J - 1)))
