"""Diagnostics against closed forms, scipy and known truths. Statistical checks ask for |z| < 4: once in 16,000 seeds by chance."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist
from scipy.stats import wasserstein_distance_nd
from sklearn.linear_model import LogisticRegression

from priors import GaussianMixturePrior
from rtb_inverse import GaussianNoise, InverseProblem, Observations, Posterior, evaluate, importance, observe, simulate_observations
from rtb_inverse.diagnostics import (
    Estimate,
    chi_squared,
    classifier_two_sample_test,
    crps,
    effective_draws,
    effective_sample_size,
    elbo,
    energy_distance,
    eubo,
    fit_generalised_pareto,
    interval_coverage,
    interval_level,
    log_mean_weight,
    pareto_smooth,
    psnr,
    rank_uniformity,
    sbc_ranks,
    sliced_wasserstein,
    split_r_hat,
    ssim,
    tarp,
    total_variation,
)

NOISE = 0.5
NAN, INF = math.nan, math.inf


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def put(x: torch.Tensor, value: float) -> torch.Tensor:
    """x with that value as its last element."""
    x = x.clone()
    x.view(-1)[-1] = value
    return x


@pytest.fixture(scope="module")
def problem() -> tuple[GaussianMixturePrior, Posterior, torch.Tensor]:
    prior = GaussianMixturePrior.random(2, 5, 0, torch.float64, steps=10)
    matrix = torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    return prior, Posterior(prior, InverseProblem(matrix, GaussianNoise(NOISE)), width=16), matrix


def test_effective_sample_size():
    assert float(effective_sample_size(torch.zeros(7, 1))) == pytest.approx(7)
    assert float(effective_sample_size(torch.tensor([[0.0], [-1000.0], [-1000.0]]))) == pytest.approx(1)
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    assert float(effective_sample_size(weights.log()[:, None] + 700)) == pytest.approx(float(1 / (weights**2).sum()), rel=1e-5)


def test_log_mean_weight():
    log_w = torch.tensor([[1.0, 800.0], [2.0, 801.0]], dtype=torch.float64)
    expected = math.log((math.e + math.e**2) / 2)
    torch.testing.assert_close(log_mean_weight(log_w), torch.tensor([expected, expected + 799], dtype=torch.float64))


def test_estimate(generator):
    values = torch.randn(100, generator=generator, dtype=torch.float64)
    estimate = Estimate.of(values)
    assert estimate.value == pytest.approx(float(values.mean()))
    assert estimate.error == pytest.approx(float(values.std()) / 10)
    assert math.isnan(Estimate.of(values[:1]).error)


@pytest.mark.parametrize(("scale", "calibrated"), [(1.0, True), (0.7, False), (1.4, False)])
@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
def test_interval_coverage_tells_calibrated_draws_from_others(scale, calibrated, level, generator):
    """Draws of the truth's own law cover as often as stated; too narrow and too wide ones are 10 standard errors off and more."""
    truth = torch.randn((4000, 1), generator=generator)
    covered = interval_coverage(scale * torch.randn((63, 4000, 1), generator=generator), truth, level)
    z = float((covered.mean() - interval_level(63, level)) / (covered.std() / math.sqrt(4000)))
    assert abs(z) < 4 if calibrated else abs(z) > 10


def test_psnr():
    truth = torch.zeros((2, 1, 4, 4))
    estimate = truth + torch.tensor([0.1, 0.2]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(psnr(estimate, truth), 20 * torch.log10(2 / torch.tensor([0.1, 0.2])))


def test_sliced_wasserstein(generator):
    x, y = torch.randn((60, 1), generator=generator), 2 + torch.randn((60, 1), generator=generator)
    squares = ((x.sort(0).values - y.sort(0).values) ** 2).mean().sqrt()
    torch.testing.assert_close(sliced_wasserstein(x, y, 4, generator), squares)  # one dimension: every direction is the axis
    assert float(sliced_wasserstein(x, y, 4, generator)) >= wasserstein_distance_nd(x.numpy(), y.numpy()) - 1e-6  # W2 >= W1
    shift = torch.tensor([3.0, 4.0])
    points = torch.randn((500, 2), generator=generator)
    assert float(sliced_wasserstein(points, points + shift, 4096, generator)) == pytest.approx(5 / math.sqrt(2), rel=0.05)
    batched = sliced_wasserstein(torch.stack([points, points], 1), torch.stack([points, points + shift], 1), 64, generator)
    assert batched.shape == (2,)
    assert float(batched[0]) == 0
    with pytest.raises(ValueError, match="same shape"):
        sliced_wasserstein(points, points[:-1])


def test_total_variation():
    assert float(total_variation(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.5, 0.5]))) == 0.5


def test_weights_all_zero():
    """No silent NaN: the first observation has no weight above 0, the second has one."""
    log_w = torch.tensor([[-INF, -INF], [-INF, 1.0]])
    assert effective_sample_size(log_w).tolist() == [0, 1]
    torch.testing.assert_close(log_mean_weight(log_w), torch.tensor([-INF, 1 - math.log(2)]))


# Pareto-smoothed importance sampling


def pareto_log_w(k: float, N: int, B: int) -> torch.Tensor:
    """Log-weights w = U^-k: every tail is generalised Pareto of shape k, and E w = 1 / (1 - k)."""
    u = torch.rand((N, B), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return -k * u.log()


@pytest.mark.parametrize("k", [0.0, 0.3, 0.7, 1.2])
def test_generalised_pareto_fit(k):
    """On scipy's samples: a bias below a quarter of the asymptotic standard error of one fit, (1 + k) / sqrt(n), a spread within 15% of
    it, and by 0.3 of it from the fit of maximum likelihood."""
    n, B = 300, 400
    error = (1 + k) / math.sqrt(n)
    x = stats.genpareto.rvs(k, scale=2.0, size=(n, B), random_state=np.random.default_rng(0))
    shape, scale = fit_generalised_pareto(torch.tensor(x).sort(0, descending=True).values)
    assert abs(float(shape.mean()) - k) < error / 4
    assert float(shape.std()) == pytest.approx(error, rel=0.15)
    assert float(scale.mean()) == pytest.approx(2, rel=0.05)
    likeliest = [stats.genpareto.fit(x[:, b], floc=0)[0] for b in range(4)]
    assert np.abs(shape[:4].numpy() - likeliest).max() < 3 * 0.3 * error


def test_generalised_pareto_fit_of_samples_of_different_sizes():
    x = torch.tensor(stats.genpareto.rvs(0.4, size=60, random_state=np.random.default_rng(0))).sort(descending=True).values[:, None]
    shorter = torch.where(torch.arange(60)[:, None] < 20, x, 0.0)
    shape, scale = fit_generalised_pareto(torch.cat([x, shorter], 1), torch.tensor([60, 20]))
    alone = fit_generalised_pareto(x)
    torch.testing.assert_close((shape[0], scale[0]), (alone[0][0], alone[1][0]))
    # not to all digits: the grid of theta is finer for the longer table
    torch.testing.assert_close(shape[1], fit_generalised_pareto(x[:20])[0][0], rtol=0, atol=0.01)


@pytest.mark.parametrize("N", [1000, 10000])
@pytest.mark.parametrize("k", [0.3, 0.5, 0.8])
def test_khat_finds_a_known_tail_index(k, N):
    """(M k + 5) / (M + 10) with the weak prior; the mean of 400 khat is off by less than a quarter of the standard error of one."""
    khat = pareto_smooth(pareto_log_w(k, N, 400))[1]
    M = math.ceil(min(N / 5, 3 * math.sqrt(N)))
    assert abs(float(khat.mean()) - (M * k + 5) / (M + 10)) < (1 + k) * math.sqrt(M) / (M + 10) / 4


def test_khat_tells_heavy_tails_from_light_ones():
    """Gaussian target N(0, 1). Proposal of standard deviation s: w ~ exp(z^2 (1 - s^2) / 2), of tail index 1 - s^2, bounded for s > 1."""
    z = normal(4000, 100)

    def khat(s: float) -> torch.Tensor:
        return pareto_smooth(z.square() * (1 - s**2) / 2)[1]

    assert float(khat(0.9).max()) < 0.7
    assert float(khat(1.5).max()) < 0
    assert float(pareto_smooth(pareto_log_w(1.5, 4000, 100))[1].min()) > 0.7


def test_smoothing_brings_a_heavy_tailed_mean_closer():
    """log E w of k = 0.7: the mean absolute error falls over 4,000 seeds by more than 4 of the standard errors of the difference, the mean
    squared error by 40% and more."""
    log_w = pareto_log_w(0.7, 1000, 4000)
    raw, smooth = ((log_mean_weight(v) - math.log(1 / 0.3)).abs() for v in (log_w, pareto_smooth(log_w)[0]))
    gain = Estimate.of(raw - smooth)
    assert gain.value > 4 * gain.error
    assert float(smooth.square().mean()) < 0.6 * float(raw.square().mean())


def test_smoothing_keeps_the_scale_the_order_and_the_body():
    log_w = pareto_log_w(0.6, 1000, 5)
    smooth, khat = pareto_smooth(log_w)
    shifted, same = pareto_smooth(log_w + 700)
    torch.testing.assert_close(shifted - 700, smooth, rtol=0, atol=1e-9)
    torch.testing.assert_close(same, khat, rtol=0, atol=1e-6)
    assert bool((smooth.argsort(0) == log_w.argsort(0)).all())
    assert bool((smooth <= log_w.max(0).values + 1e-12).all())
    M = math.ceil(3 * math.sqrt(1000))
    body = log_w.argsort(0, descending=True)[M:]
    torch.testing.assert_close(smooth.gather(0, body), log_w.gather(0, body), rtol=0, atol=0)
    assert int((smooth != log_w).sum(0).min()) >= M - 1  # the largest may stay at its bound, the largest raw weight
    single, khat_single = pareto_smooth(log_w.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(khat_single.double(), khat, rtol=0, atol=1e-3)


def test_smoothed_tail_is_made_of_the_quantiles_of_the_fit():
    """By the paper's recipe with scipy's quantile function."""
    w = pareto_log_w(0.4, 200, 1).exp()
    M = 40
    ordered = w[:, 0].sort(descending=True).values
    shape, scale = fit_generalised_pareto((ordered[:M] - ordered[M])[:, None])
    khat = (M * float(shape) + 5) / (M + 10)
    quantiles = stats.genpareto.ppf((np.arange(M, 0, -1) - 0.5) / M, khat, loc=float(ordered[M]), scale=float(scale))
    smooth, found = pareto_smooth(w.log())
    assert float(found) == pytest.approx(khat)
    np.testing.assert_allclose(smooth[:, 0].sort(descending=True).values[:M].exp(), np.minimum(quantiles, float(ordered[0])))


def test_khat_where_there_is_no_tail_to_fit():
    log_w = pareto_log_w(0.4, 100, 1)[:, 0]
    few = torch.where(torch.arange(100) < 4, log_w, -INF)  # four weights above 0
    some = torch.where(torch.arange(100) < 10, log_w, -INF)
    equal = torch.full((100,), 900.0, dtype=torch.float64) + 1e-13 * log_w
    underflow = torch.where(torch.arange(100) < 1, log_w + 2000, log_w)  # one weight has it all
    clipped = log_w.clamp_max(log_w.sort().values[-30])
    columns = torch.stack([few, some, equal, underflow, clipped], 1)
    smooth, khat = pareto_smooth(columns)
    assert khat[[0, 2, 3, 4]].tolist() == [INF, -INF, INF, -INF]
    assert bool(khat[1].isfinite())
    torch.testing.assert_close(smooth[:, [0, 2, 3, 4]], columns[:, [0, 2, 3, 4]])
    assert not bool(smooth.isnan().any())
    assert pareto_smooth(columns[:20, :1])[1].tolist() == [INF]  # four tail weights


# Scores and distances


def test_crps():
    """Pair by pair, and unbiased for the closed form of a normal forecast N(0, 1): s (z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi))."""
    draws, truth = normal(7, 3, 2, 2), normal(3, 2, 2, seed=1)
    pairs = (draws[:, None] - draws[None]).abs().sum((0, 1)) / (2 * 7 * 6)
    expected = ((draws - truth).abs().mean(0) - pairs).flatten(1).mean(1)
    torch.testing.assert_close(crps(draws, truth), expected)
    torch.testing.assert_close(crps(draws[..., 0, 0], truth[:, 0, 0]), ((draws - truth).abs().mean(0) - pairs)[:, 0, 0])
    z = np.linspace(-3, 3, 20000)
    closed = z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi)
    gap = Estimate.of(crps(normal(4, 20000), torch.tensor(z)) - torch.tensor(closed))
    assert abs(gap.value) < 4 * gap.error


@pytest.mark.parametrize(("size", "window_std"), [(20, 1.5), (11, 1.5), (8, 0.9), (5, 0.6), (3, 0.3)])
def test_ssim(size, window_std, generator):
    """The inner part of torchmetrics' map, where its window does not meet the border."""
    image = pytest.importorskip("torchmetrics.functional.image")
    truth = torch.rand((2, 3, size, size + 1), generator=generator, dtype=torch.float64)
    estimate = 0.7 * truth + 0.2 * torch.rand(truth.shape, generator=generator, dtype=torch.float64)
    for data_range in (1.0, 2.0):
        options = {"sigma": window_std, "data_range": data_range, "reduction": "none", "return_full_image": True}
        full = image.structural_similarity_index_measure(estimate, truth, **options)[1]
        r = min(5, (size - 1) // 2)
        torch.testing.assert_close(ssim(estimate, truth, data_range), full[..., r:-r, r:-r].flatten(1).mean(1))
    torch.testing.assert_close(ssim(truth, truth), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("chunk_size", [1, 100, 2**24])
def test_energy_distance(chunk_size):
    x, y = normal(9, 3, 2, 2), 0.5 + normal(7, 3, 2, 2, seed=1)
    expected = []
    for b in range(3):
        u, v = x[:, b].flatten(1).numpy(), y[:, b].flatten(1).numpy()
        expected.append(2 * cdist(u, v).mean() - cdist(u, u).sum() / (9 * 8) - cdist(v, v).sum() / (7 * 6))
    torch.testing.assert_close(energy_distance(x, y, chunk_size), torch.tensor(expected, dtype=torch.float64))
    assert float(energy_distance(x[:, 0].flatten(1), y[:, 0].flatten(1), chunk_size)) == pytest.approx(expected[0])


def test_energy_distance_of_two_gaussians():
    """One dimension, standard deviation 1, means 2 apart: 2 E|N(2, 2)| - 2 E|N(0, 2)|, from scipy's folded normal."""
    x, y = normal(40, 2000, 1), 2 + normal(40, 2000, 1, seed=1)
    s = math.sqrt(2)
    expected = 2 * stats.foldnorm.mean(2 / s, scale=s) - 2 * stats.foldnorm.mean(0, scale=s)
    gap = Estimate.of(energy_distance(x, y))
    assert abs(gap.value - expected) < 4 * gap.error


def test_chi_squared():
    residual = 1.2 * normal(5, 3, 2, 4)
    T = residual.square().sum((2, 3))
    found = chi_squared(residual)
    torch.testing.assert_close(found.reduced, T.mean(0) / 8)
    np.testing.assert_allclose(found.p_value, stats.chi2.sf(T, 8).mean(0))
    many = 1.01 * normal(1, 2, 10000)  # as many elements as an image
    np.testing.assert_allclose(chi_squared(many).p_value, stats.chi2.sf(many.square().sum((0, 2)), 10000), rtol=1e-6)


def test_classifier_two_sample_test():
    x, y = normal(200, 1, 2), normal(200, 1, 2, seed=1)

    def test(y, classifier=None):
        return classifier_two_sample_test(x, y, classifier=classifier, generator=torch.Generator().manual_seed(0))

    assert test(y) == test(y)
    apart = test(y + 20)
    assert apart.value == 1
    assert apart.error == pytest.approx(1.5 * 0.5 / math.sqrt(400))
    # a linear rule is blind to a width, as its docstring has it: "whatever its classifier can learn"
    assert test(0.4 * y).value - 0.5 > 3 * apart.error > test(0.4 * y, LogisticRegression()).value - 0.5


# Chains


def autoregressive(phi: float, S: int, N: int, B: int) -> torch.Tensor:
    """Stationary AR(1) chains (S, N, B) of variance 1 and autocorrelation phi^t, so of S N (1 - phi) / (1 + phi) effective draws."""
    x = normal(S, N, B)
    x[1:] *= math.sqrt(1 - phi**2)
    for s in range(1, S):
        x[s] += phi * x[s - 1]
    return x


@pytest.mark.parametrize("phi", [-0.5, 0.0, 0.5, 0.9])
def test_effective_draws_of_autoregressive_chains(phi):
    """In the mean over 50 observations within 10% of the closed form; the estimator is consistent, not unbiased."""
    found = effective_draws(autoregressive(phi, 2000, 4, 50))
    assert float(found.mean()) == pytest.approx(8000 * (1 - phi) / (1 + phi), rel=0.1)


def test_effective_draws_take_the_worst_element():
    fast, slow = autoregressive(0.0, 500, 4, 3), autoregressive(0.9, 500, 4, 3)
    both = torch.stack([fast, slow, torch.full_like(fast, 0.3)], -1)
    torch.testing.assert_close(effective_draws(both), effective_draws(slow))
    assert effective_draws(both[..., 2]).tolist() == [2000] * 3  # never changes
    torch.testing.assert_close(split_r_hat(both), torch.maximum(split_r_hat(fast), split_r_hat(slow)))
    assert split_r_hat(both[..., 2]).tolist() == [1] * 3


def r_hat_by_hand(x: np.ndarray) -> float:
    """Of (S, N), S even, by the formulas of Vehtari et al. (2021), section 4."""
    halves = np.concatenate(np.split(x, 2), 1)
    found = []
    for v in (halves, np.abs(halves - np.median(halves))):
        z = stats.norm.ppf((stats.rankdata(v) - 3 / 8) / (v.size + 1 / 4)).reshape(v.shape)
        n = len(z)
        between, within = n * z.mean(0).var(ddof=1), z.var(0, ddof=1).mean()
        found.append(math.sqrt(((n - 1) / n * within + between / n) / within))
    return max(found)


def test_split_r_hat():
    good = normal(400, 4, 3)
    chains = {
        "good": good,
        "shifted": good + torch.tensor([1.0, 0, 0, 0])[:, None],
        "wide": good * torch.tensor([3.0, 1, 1, 1])[:, None],  # of equal means: only the folded draws see it
        "drifting": good + torch.linspace(-1, 1, 400)[:, None, None],  # alike in every chain: only the split sees it
        "few levels": good.round(),
    }
    for name, x in chains.items():
        found = split_r_hat(x)
        np.testing.assert_allclose(found, [r_hat_by_hand(x[..., b].numpy()) for b in range(3)])
        assert bool((found < 1.02).all()) == (name in ("good", "few levels")), name
    stuck = torch.arange(4.0)[None, :, None].expand(400, 4, 1)
    assert float(split_r_hat(stuck)) > 100
    assert float(effective_draws(stuck)) < 8
    heavy = (good.square().log() * 10).exp()
    torch.testing.assert_close(split_r_hat(heavy), split_r_hat(good.abs()))  # ranks are all that counts
    torch.testing.assert_close(split_r_hat(torch.cat([good[:200], good[:1], good[200:]])), split_r_hat(good))


# Bad input

D, T, W = normal(12, 10, 2), normal(10, 2, seed=1), normal(30, 10)
IMAGES = normal(3, 1, 8, 8)
DEAD = torch.where(torch.arange(10) == 3, -INF, W)
RANKS = torch.zeros((10, 2), dtype=torch.long)
BAD = {
    "pareto_smooth: shape": (lambda: pareto_smooth(W[:, 0]), r"log_w must have shape \(N, B\), got \(30,\)"),
    "pareto_smooth: all -inf": (lambda: pareto_smooth(DEAD), r"log_w must have a weight above 0 .* -inf alone for \[3\] of 10"),
    "sbc_ranks: truth": (lambda: sbc_ranks(D, T[:5]), r"truth must have the shape .* \(10, 2\), got \(5, 2\)"),
    "sbc_ranks: draws": (lambda: sbc_ranks(D[:, 0, 0], T), r"draws must have shape \(N, B, \*shape\), got \(12,\)"),
    "sbc_ranks: statistics": (lambda: sbc_ranks(D, T, [lambda x: x.mean()]), r"statistics must take \(13, 10, 2\) to \(13, 10\)"),
    "rank_uniformity: few": (lambda: rank_uniformity(RANKS[:1], 12), "ranks must hold at least 10 observations .* got B = 1"),
    "rank_uniformity: range": (lambda: rank_uniformity(RANKS + 13, 12), r"ranks must be in 0 \.\.\. n = 12, got 13 to 13"),
    "rank_uniformity: floats": (lambda: rank_uniformity(RANKS.double(), 12), "ranks must be an integer tensor"),
    "rank_uniformity: n": (lambda: rank_uniformity(RANKS, 0), "n must be an integer of at least 1, got 0"),
    "tarp: few": (lambda: tarp(D[:, :1], T[:1]), "draws must hold at least 10 observations .* got B = 1"),
    "tarp: references": (lambda: tarp(D, T, T[:, :1]), r"references and truth must have the same shape, got \(10, 1\)"),
    "interval_coverage: truth": (lambda: interval_coverage(D, T[:, :1], 0.5), "truth must have the shape"),
    "interval_coverage: level": (lambda: interval_coverage(D, T, 50), "level must be above 0 and below 1, got 50"),
    "chi_squared: shape": (lambda: chi_squared(T[:, 0]), r"residual must have shape \(N, B, \*shape\), got \(10,\)"),
    "crps: one draw": (lambda: crps(D[:1], T), r"draws must have shape .* at least 2 draws, got \(1, 10, 2\)"),
    "energy_distance: shape": (lambda: energy_distance(D, D[:, :2]), r"x and y must have the same shape after the draws"),
    "energy_distance: one draw": (lambda: energy_distance(D, D[:1]), "y must have shape .* at least 2 draws"),
    "energy_distance: chunk_size": (lambda: energy_distance(D, D, 0), "chunk_size must be an integer of at least 1, got 0"),
    "sliced_wasserstein: directions": (lambda: sliced_wasserstein(D, D, 0), "directions must be an integer"),
    "classifier: few": (lambda: classifier_two_sample_test(T[:9], T[:9]), "x and y must hold at least 2 draws per fold, 10, got 9"),
    "classifier: shape": (lambda: classifier_two_sample_test(T, T[:9]), "x and y must have the same shape"),
    "classifier: folds": (lambda: classifier_two_sample_test(T, T, 1), "folds must be an integer of at least 2, got 1"),
    "psnr: shape": (lambda: psnr(T, T[:1]), r"estimate and truth must have the same shape, got \(10, 2\) and \(1, 2\)"),
    "psnr: data_range": (lambda: psnr(T, T, 0), "data_range must be a finite number above 0, got 0"),
    "ssim: shape": (lambda: ssim(T, T), r"truth must have shape \(B, C, H, W\) with H and W at least 3, got \(10, 2\)"),
    "ssim: small": (lambda: ssim(IMAGES[..., :2], IMAGES[..., :2]), "H and W at least 3"),
    "split_r_hat: few": (lambda: split_r_hat(D[:3]), r"chains must have shape \(S, N, B, \*shape\) with S at least 4 sweeps"),
    "effective_draws: shape": (lambda: effective_draws(T), r"chains must have shape .* got \(10, 2\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()


HOLES = {
    "draws": [lambda x: sbc_ranks(x, T), lambda x: tarp(x, T), lambda x: interval_coverage(x, T, 0.5), lambda x: crps(x, T)],
    "truth": [lambda x: sbc_ranks(D, x), lambda x: tarp(D, x), lambda x: crps(D, x), lambda x: interval_coverage(D, x, 0.5),
              lambda x: psnr(T, x)],
    "estimate": [lambda x: psnr(x, T)],
    "references": [lambda x: tarp(D, T, x)],
    "residual": [chi_squared],
    "x": [lambda x: energy_distance(x, T), lambda x: sliced_wasserstein(x, T), lambda x: classifier_two_sample_test(x, T)],
    "y": [lambda x: energy_distance(T, x), lambda x: sliced_wasserstein(T, x), lambda x: classifier_two_sample_test(T, x)],
    "chains": [split_r_hat, effective_draws],
    "log_w": [elbo, eubo, effective_sample_size, log_mean_weight, pareto_smooth],
}  # fmt: skip
GOOD = {"draws": D, "residual": D, "chains": D, "log_w": W}


@pytest.mark.parametrize("name", HOLES)
def test_nan_is_named(name):
    good = GOOD.get(name, T)
    for call in HOLES[name]:
        call(good)
        for value in (NAN, INF):
            with pytest.raises(ValueError, match=rf"{name} must be .* NaN or \+?infinity in 1 of {good.numel()} elements"):
                call(put(good, value))
        with pytest.raises(TypeError, match=f"{name} must "):
            call(good.long())
        with pytest.raises(ValueError, match=f"{name} "):
            call(good[:0])


def test_some_weights_of_zero_are_fine():
    log_w = put(W, -INF)
    torch.testing.assert_close(effective_sample_size(log_w)[:9], effective_sample_size(W)[:9])
    torch.testing.assert_close(effective_sample_size(log_w)[9], effective_sample_size(W[:29, 9:])[0])
    torch.testing.assert_close(log_mean_weight(log_w)[9].exp() * 30, W[:29, 9].exp().sum())
    smooth, khat = pareto_smooth(log_w)
    assert float(smooth[-1, -1]) == -INF
    assert bool(khat.isfinite().all())


# On a posterior


def test_importance_is_unbiased_for_the_evidence(problem, generator):
    prior, posterior, matrix = problem
    y = posterior.problem.simulate(prior.sample(4, generator), generator)
    weights = importance(posterior, y, 4000, generator, batch_size=1500)
    ratio = (weights.log_w - prior.log_evidence(matrix, NOISE, y)).exp()
    z = (ratio.mean(0) - 1) / (ratio.std(0) / math.sqrt(4000))
    assert float(z.abs().max()) < 4
    assert float(((weights.log_z - prior.log_evidence(matrix, NOISE, y)) / weights.log_z_error).abs().max()) < 4
    exact = prior.posterior(matrix, NOISE, y)
    spread = exact.distribution.variance.sqrt()
    assert float(((weights.mean - exact.distribution.mean) / (spread / weights.ess.sqrt()[:, None])).abs().max()) < 4


def test_evaluate_brackets_the_exact_evidence(problem, generator):
    """ELBO <= log Z <= EUBO in the mean, with the gap well resolved for an untrained posterior; importance sampling hits log Z."""
    prior, posterior, matrix = problem
    held = simulate_observations(posterior, 200, generator)
    report = evaluate(posterior, held, 128, generator)
    log_z = prior.log_evidence(matrix, NOISE, held.y)
    numbers = report.numbers
    assert (float(log_z.mean()) - numbers["elbo"].value) / numbers["elbo"].error > -1
    assert numbers["eubo"].value > numbers["elbo"].value
    log_w = report.draws.log_w
    gap = log_z - log_w.mean(0)
    assert float(gap.mean() / (gap.std() / math.sqrt(200))) > 4  # untrained: the bound is not tight
    assert numbers["eubo"].value - float(log_z.mean()) > -4 * numbers["eubo"].error
    assert abs(numbers["log_z_is"].value - float(log_z.mean())) < 0.05
    for level in (50, 80, 90):
        assert 0 < numbers[f"coverage_{level}"].value <= 1


def test_reports_are_written(problem, generator, tmp_path):
    _, posterior, _ = problem
    held = observe(posterior, torch.randn((3, 2), generator=generator, dtype=torch.float64), generator)
    report = evaluate(posterior, held, 8, generator)
    report.save(tmp_path)
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["numbers"]["ess"]["value"] == report.numbers["ess"].value
    assert "eubo" not in written["numbers"]  # no paths of the prior, no valid upper bound
    without_truth = evaluate(posterior, Observations(held.y), 8, generator)
    assert "psnr" not in without_truth.numbers
    assert "elbo" in str(without_truth)


def test_a_report_with_tests_of_calibration(problem, tmp_path, generator):
    """A posterior that is as good as exact passes both; one that is too wide fails; and what was looked at is saved."""
    _, posterior, _ = problem
    held = simulate_observations(posterior, 300, generator)
    report = evaluate(posterior, held, 63, generator)
    assert set(report.p_values) == {"sbc", "tarp"} and min(report.p_values.values()) > 1e-4  # false alarms: 1 in 5,000
    assert abs(report.numbers["chi_squared"].value - 1) < 4.5 * report.numbers["chi_squared"].error
    wide = copy.deepcopy(posterior)
    with torch.no_grad():
        wide.log_scale += 0.7
    assert min(evaluate(wide, held, 63, generator).p_values.values()) < 1e-4
    report.save(tmp_path, "page")
    assert {file.name for file in tmp_path.iterdir()} == {"page.json", "page.md", "page.png", "page_panel.png"}
    assert json.loads((tmp_path / "page.json").read_text())["p_values"] == report.p_values
    assert f"| sbc | {report.p_values['sbc']:.2g} |" in (tmp_path / "page.md").read_text()
    assert evaluate(posterior, held.y, 63, generator).p_values == {}  # the truth is not known


@pytest.mark.parametrize("d", [1, 2, 5])
def test_a_report_of_one_observation_has_no_silent_nan(d, generator, tmp_path):
    """Standard errors over the draws, or null with a note; a picture for vectors of any length."""
    prior = GaussianMixturePrior.random(d, 3, 0, torch.float64, steps=4)
    posterior = Posterior(prior, InverseProblem(torch.ones((1, d), dtype=torch.float64), GaussianNoise(0.5)), width=16)
    report = evaluate(posterior, simulate_observations(posterior, 1, generator), 20, generator)
    report.save(tmp_path)
    written = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in the report"))
    assert written["numbers"]["elbo"]["error"] > 0 and written["numbers"]["psnr"]["error"] is None
    assert {"one observation", "p-values"} <= written["notes"].keys()
    assert "nan" not in (tmp_path / "report.md").read_text().lower()
    assert (tmp_path / "report_panel.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_missing_is_said(problem, generator):
    _, posterior, _ = problem
    y = posterior.problem.simulate(torch.zeros((2, 2), dtype=torch.float64), generator)
    assert {"truth", "eubo"} <= evaluate(posterior, y, 8, generator).notes.keys()


def test_bad_draws_and_truths_are_one_clear_error(problem, generator, monkeypatch):
    _, posterior, _ = problem
    held = simulate_observations(posterior, 3, generator)
    with pytest.raises(ValueError, match="n must be an integer of at least 2, got 1"):
        evaluate(posterior, held, 1)
    with pytest.raises(ValueError, match=r"observations.x must have shape \(B, 2\), got \(3, 1\)"):
        evaluate(posterior, Observations(held.y, held.x[:, :1]), 8)
    with pytest.raises(ValueError, match="observations must hold as many x as y, got 2 and 3"):
        evaluate(posterior, Observations(held.y, held.x[:2]), 8)
    with pytest.raises(ValueError, match=r"observations\.x must be finite"):
        evaluate(posterior, Observations(held.y, put(held.x, NAN)), 8)
    monkeypatch.setattr(posterior.problem, "log_likelihood", lambda x, y: 0 * (x.sum(-1) + y.sum(-1)) - INF)
    with pytest.raises(ValueError, match="above -infinity for one draw of every observation at least"):
        evaluate(posterior, held, 32, generator)
    monkeypatch.undo()
    monkeypatch.setattr(posterior, "decode", lambda x: x * NAN)
    with pytest.raises(ValueError, match=r"must be finite, got NaN"):
        evaluate(posterior, held, 8, generator)
    with pytest.raises(ValueError, match=r"finite|NaN"):
        evaluate(posterior, held.y, 8, generator)
