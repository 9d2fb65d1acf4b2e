"""What each diagnostic sees: draws that are exact, shifted, too narrow, too wide, or miss a mode.

Model: x = (x_0, x_1), x_0 = +-1.5 with noise of standard deviation 0.5 (two modes, which y does not see), x_1 ~ N(0, 1), y = x_1 + N(0, 1);
so p(x | y) is the two modes times N(y / 2, 1 / 2). A defect changes x_0 within its modes and x_1 around its mean alike.

Power is stated over 20 seeds: each defect is to be found in at least 19. Exact draws are judged by the same rule in the same 20 seeds and
never flagged; where a test gives p-values, these are also uniform over 200 seeds (Kolmogorov-Smirnov, p > 1e-3). Where a diagnostic cannot
see a defect by its nature (`BLIND`), it is to be silent in the same way: no alarm in 20 seeds.
"""

import math
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Generator, Tensor

from rtb_inverse.diagnostics import (
    Estimate,
    chi_squared,
    classifier_two_sample_test,
    crps,
    effective_sample_size,
    elbo,
    energy_distance,
    eubo,
    interval_coverage,
    interval_level,
    log_mean_weight,
    psnr,
    rank_uniformity,
    sbc_ranks,
    sliced_wasserstein,
    ssim,
    tarp,
)

SEEDS, LEAST = 20, 19
DEFECTS = ("shifted", "narrow", "wide", "missing mode")
ALPHA = 1e-3  # of one test: 20 exact seeds raise an alarm once in 50 runs
LIMIT = 4.0  # of a z-score: once in 16,000
MODE, MODE_STD, POSTERIOR_STD = 1.5, 0.5, math.sqrt(0.5)


def observe(B: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Truths (B, 2) and what is observed of them (B,)."""
    x_1 = torch.randn(B, generator=generator)
    return torch.stack([two_modes((B,), "exact", generator), x_1], -1), x_1 + torch.randn(B, generator=generator)


def scale_shift(defect: str) -> tuple[float, float]:
    """Factor of the posterior's standard deviation, and offset in units of it."""
    return {"narrow": (0.5, 0.0), "wide": (2.0, 0.0), "shifted": (1.0, 1.0)}.get(defect, (1.0, 0.0))


def two_modes(shape: tuple[int, ...], defect: str, generator: Generator) -> Tensor:
    scale, shift = scale_shift(defect)
    sign = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return MODE * (sign.abs() if defect == "missing mode" else sign) + MODE_STD * (scale * torch.randn(shape, generator=generator) + shift)


def sample(y: Tensor, N: int, defect: str, generator: Generator) -> Tensor:
    """N draws (N, B, 2) of p(x | y), or of what the defect makes of it."""
    scale, shift = scale_shift(defect)
    shape = N, len(y)
    x_1 = y / 2 + POSTERIOR_STD * (scale * torch.randn(shape, generator=generator) + shift)
    return torch.stack([two_modes(shape, defect, generator), x_1], -1)


def joint(B: int, N: int, defect: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Generator]:
    """Draws (N, B, 2), truth (B, 2), y (B,)."""
    generator = Generator().manual_seed(seed)
    truth, y = observe(B, generator)
    return sample(y, N, defect, generator), truth, y, generator


def two_sets(B: int, N: int, defect: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Generator]:
    """Draws, and two more sets of exact draws, (N, B, 2) each."""
    generator = Generator().manual_seed(seed)
    _, y = observe(B, generator)
    return *(sample(y, N, law, generator) for law in (defect, "exact", "exact")), generator


def sbc_p(defect: str, seed: int) -> float:
    draws, truth, _, generator = joint(300, 63, defect, seed)
    p = rank_uniformity(sbc_ranks(draws, truth, generator=generator), 63)
    return float(p.min()) * len(p)


def tarp_p(defect: str, seed: int) -> float:
    draws, truth, _, generator = joint(1000, 63, defect, seed)  # with 300 the shift is found in one seed of five
    return tarp(draws, truth, generator=generator).p_value


def interval_z(defect: str, seed: int) -> float:
    draws, truth, _, _ = joint(300, 63, defect, seed)
    covered = Estimate.of(interval_coverage(draws, truth, 0.8))
    return abs(covered.value - interval_level(63, 0.8)) / covered.error


def residual(draws: Tensor, y: Tensor) -> Tensor:
    return y[:, None] - draws[..., 1:]  # the noise has variance 1


def chi_squared_z(defect: str, seed: int) -> float:
    draws, _, y, _ = joint(300, 63, defect, seed)
    reduced = Estimate.of(chi_squared(residual(draws, y)).reduced)
    return abs(reduced.value - 1) / reduced.error


def energy_z(defect: str, seed: int) -> float:
    draws, exact, _, _ = two_sets(40, 100, defect, seed)
    distance = Estimate.of(energy_distance(draws, exact))
    return distance.value / distance.error


def sliced_wasserstein_z(defect: str, seed: int) -> float:
    draws, exact, other, generator = two_sets(40, 200, defect, seed)
    gap = sliced_wasserstein(draws, exact, 32, generator) - sliced_wasserstein(other, exact, 32, generator)
    return Estimate.of(gap).value / Estimate.of(gap).error


def classifier_z(defect: str, seed: int) -> float:
    draws, exact, _, generator = two_sets(1, 600, defect, seed)
    accuracy = classifier_two_sample_test(draws[:, 0], exact[:, 0], generator=generator)
    return (accuracy.value - 0.5) / accuracy.error


def crps_z(defect: str, seed: int) -> float:
    generator = Generator().manual_seed(seed)
    truth, y = observe(2000, generator)
    gap = crps(sample(y, 63, defect, generator), truth) - crps(sample(y, 63, "exact", generator), truth)
    return Estimate.of(gap).value / Estimate.of(gap).error


# As an image (1, 8, 8): two bars, of height x_0 and x_1
BARS = torch.zeros((2, 1, 8, 8))
BARS[0, 0, 1:4, 1:7] = BARS[1, 0, 5:7, 2:6] = 0.4


def of_the_mean(score: Callable[[Tensor, Tensor], Tensor]) -> Callable[[str, int], float]:
    """z-score of how much lower a score of the mean image is than for exact draws. But for the missing mode only the bar of x_1 is drawn:
    between two modes the exact mean lies where no truth is, and one moved towards a mode may score higher."""

    def loss(defect: str, seed: int) -> float:
        generator = Generator().manual_seed(seed)
        truth, y = observe(1000, generator)
        bars = BARS[int(defect != "missing mode") :]
        means = (sample(y, 200, law, generator).mean(0) for law in (defect, "exact"))
        picture, mean, exact = (torch.einsum("bk,kchw->bchw", x[:, -len(bars) :], bars) for x in (truth, *means))
        gap = Estimate.of(score(exact, picture) - score(mean, picture))
        return gap.value / gap.error

    return loss


# Weights of one-step paths: log w = log p(x, y) - log q(x | y), with both densities in closed form


def log_normal(x: Tensor, mean: Tensor | float, std: float) -> Tensor:
    return -((x - mean) / std).square() / 2 - math.log(std * math.sqrt(2 * math.pi))


def log_two_modes(x: Tensor, defect: str) -> Tensor:
    scale, shift = scale_shift(defect)
    modes = (1,) if defect == "missing mode" else (-1, 1)
    logs = [log_normal(x, sign * MODE + MODE_STD * shift, MODE_STD * scale) for sign in modes]
    return torch.stack(logs).logsumexp(0) - math.log(len(modes))


def log_q(x: Tensor, y: Tensor, defect: str) -> Tensor:
    scale, shift = scale_shift(defect)
    return log_two_modes(x[..., 0], defect) + log_normal(x[..., 1], y / 2 + POSTERIOR_STD * shift, POSTERIOR_STD * scale)


def log_weights(x: Tensor, y: Tensor, defect: str) -> Tensor:
    log_p = log_two_modes(x[..., 0], "exact") + log_normal(x[..., 1], 0.0, 1.0) + log_normal(y, x[..., 1], 1.0)
    return log_p - log_q(x, y, defect)


def weighed(defect: str, seed: int, N: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Log-weights (N, B) of draws, (1, B) of the truths, and log Z (B,), y ~ N(0, 2); double precision: exact weights are equal."""
    draws, truth, y, _ = joint(100, N, defect, seed)
    draws, truth, y = draws.double(), truth.double(), y.double()
    return log_weights(draws, y, defect), log_weights(truth[None], y, defect), log_normal(y, 0.0, math.sqrt(2))


def z_score(gap: Tensor) -> float:
    """Exact draws have a gap of rounding errors, which is no gap."""
    estimate = Estimate.of(gap)
    return estimate.value / max(estimate.error, 1e-9)


def elbo_z(defect: str, seed: int) -> float:
    own, _, log_z = weighed(defect, seed)
    return z_score(log_z - elbo(own))


def eubo_z(defect: str, seed: int) -> float:
    _, of_truth, log_z = weighed(defect, seed)
    return z_score(eubo(of_truth) - log_z)


def bounds_gap_z(defect: str, seed: int) -> float:
    """Needs no log Z."""
    own, of_truth, _ = weighed(defect, seed)
    return z_score(eubo(of_truth) - elbo(own))


def log_z_error(defect: str, seed: int) -> float:
    """Bias in nats, of 1000 draws."""
    own, _, log_z = weighed(defect, seed, 1000)
    return abs(float((log_mean_weight(own) - log_z).mean()))


def ess_loss(defect: str, seed: int) -> float:
    own, _, _ = weighed(defect, seed)
    return 1 - float(effective_sample_size(own).mean()) / len(own)


def below(statistic: Callable[[str, int], float], limit: float) -> Callable[[str, int], bool]:
    return lambda defect, seed: statistic(defect, seed) < limit


def above(statistic: Callable[[str, int], float], limit: float) -> Callable[[str, int], bool]:
    return lambda defect, seed: statistic(defect, seed) > limit


DETECTORS = {
    "sbc": below(sbc_p, ALPHA),
    "tarp": below(tarp_p, ALPHA),
    "interval_coverage": above(interval_z, LIMIT),
    "chi_squared": above(chi_squared_z, LIMIT),
    "energy_distance": above(energy_z, LIMIT),
    "sliced_wasserstein": above(sliced_wasserstein_z, LIMIT),
    "classifier_two_sample_test": above(classifier_z, 3.0),
    "crps": above(crps_z, LIMIT),
    "psnr": above(of_the_mean(psnr), LIMIT),
    "ssim": above(of_the_mean(ssim), LIMIT),
    "elbo": above(elbo_z, LIMIT),
    "eubo": above(eubo_z, LIMIT),
    "eubo - elbo": above(bounds_gap_z, LIMIT),
    "log_mean_weight": above(log_z_error, 0.1),
    "effective_sample_size": above(ess_loss, 0.2),
}
BLIND = {
    ("chi_squared", "missing mode"),  # a mode that y does not see
    ("effective_sample_size", "missing mode"),  # the mode that is kept has equal weights
    ("psnr", "narrow"), ("psnr", "wide"), ("ssim", "narrow"), ("ssim", "wide"),  # the mean stays where it is
    ("psnr", "missing mode"), ("ssim", "missing mode"),  # the mean of one mode is sharper than that of two
    ("log_mean_weight", "shifted"), ("log_mean_weight", "narrow"), ("log_mean_weight", "wide"),  # the weights make up for it
}  # fmt: skip


def alarms(name: str, defect: str) -> int:
    return sum(DETECTORS[name](defect, seed) for seed in range(SEEDS))


@pytest.mark.parametrize("name", DETECTORS)
def test_exact_draws_pass(name):
    assert alarms(name, "exact") == 0


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("name", DETECTORS)
def test_defects_are_found(name, defect):
    found = alarms(name, defect)
    assert found == 0 if (name, defect) in BLIND else found >= LEAST


def one_draw_chi_squared_p(defect: str, seed: int) -> float:
    draws, _, y, _ = joint(1, 1, defect, seed)
    return float(chi_squared(residual(draws, y)).p_value)


def one_statistic_sbc_p(defect: str, seed: int) -> float:
    draws, truth, _, generator = joint(200, 30, defect, seed)
    return float(rank_uniformity(sbc_ranks(draws, truth, [lambda x: x.sum(-1)], generator), 30))


@pytest.mark.parametrize("p_value", [one_statistic_sbc_p, tarp_p, one_draw_chi_squared_p])
def test_p_values_of_exact_draws_are_uniform(p_value):
    """The p-values of 200 seeds, which no defect here leaves uniform."""
    p = [p_value("exact", seed) for seed in range(200)]
    assert stats.kstest(p, "uniform").pvalue > ALPHA


def test_predictive_p_values_of_many_draws_are_conservative():
    """P(p <= alpha) <= 2 alpha, and less spread than uniform."""
    draws, _, y, _ = joint(4000, 16, "exact", 0)
    p = chi_squared(residual(draws, y)).p_value
    assert float(p.var()) < 1 / 12 * (1 - 4 * math.sqrt(2 / 4000))
    for alpha in (0.01, 0.05):
        assert float((p <= alpha).double().mean()) <= 2 * alpha + 4 * math.sqrt(2 * alpha / 4000)


def test_classifier_error_is_on_the_large_side():
    """Over 100 seeds of one law the z-scores spread by less than 1; they would by about 1.2 had the folds been taken as independent."""
    z = torch.tensor([classifier_z("exact", seed) for seed in range(100)])
    assert 0.6 < float(z.std()) < 1
    assert abs(float(z.mean())) < 4 * float(z.std()) / math.sqrt(100)


@pytest.mark.parametrize("name", ["sbc", "tarp"])
def test_draws_of_the_prior_look_calibrated(name):
    """What the docstrings say is not seen: draws that ignore y. A statistic that looks at y does see it."""
    alarmed = seen = 0
    for seed in range(SEEDS):
        generator = Generator().manual_seed(seed)
        truth, y = observe(300, generator)
        draws = torch.stack([observe(300, generator)[0] for _ in range(63)])
        if name == "tarp":
            alarmed += tarp(draws, truth, generator=generator).p_value < ALPHA
            toward_y = torch.stack([torch.zeros_like(y), 4 * y], -1)
            seen += tarp(draws, truth, toward_y, generator).p_value < ALPHA
        else:
            alarmed += float(rank_uniformity(sbc_ranks(draws, truth, generator=generator), 63).min()) < ALPHA / 2
            misfit = [lambda x, y=y: (y - x[..., 1]).square()]
            seen += float(rank_uniformity(sbc_ranks(draws, truth, misfit, generator), 63)) < ALPHA
    assert alarmed == 0
    assert seen >= LEAST


def test_random_projections_see_narrow_draws_of_many_elements():
    generator = Generator().manual_seed(0)
    truth = torch.randn((200, 1, 8, 8), generator=generator)
    for scale, calibrated in ((1.0, True), (0.7, False)):
        ranks = sbc_ranks(scale * torch.randn((31, 200, 1, 8, 8), generator=generator), truth, generator=generator)
        assert ranks.shape == (200, 32)
        assert (float(rank_uniformity(ranks, 31).min()) > ALPHA / 32) == calibrated


def test_ties_are_broken_at_random():
    """Draws and truths of two values only: ranks are uniform all the same."""
    generator = Generator().manual_seed(0)
    draws, truth = (torch.randint(0, 2, shape, generator=generator).double() for shape in ((9, 2000, 1), (2000, 1)))
    ranks = sbc_ranks(draws, truth, generator=generator)
    assert (int(ranks.min()), int(ranks.max())) == (0, 9)
    assert float(rank_uniformity(ranks, 9)) > ALPHA
    assert tarp(draws, truth, torch.zeros_like(truth), generator).p_value > ALPHA


@pytest.mark.parametrize("n", [1, 9, 12, 63, 100])
def test_rank_uniformity_is_uniform_whether_or_not_bins_divide_the_ranks(n):
    """p-values of 400 statistics of uniform ranks; ranks pushed up by a tenth are found in all."""
    generator = Generator().manual_seed(n)
    ranks = torch.randint(0, n + 1, (1000, 400), generator=generator)
    p = rank_uniformity(ranks, n)
    assert abs(float(p.mean()) - 0.5) < 4 / math.sqrt(12 * 400)
    assert float(rank_uniformity(torch.where(torch.rand(ranks.shape, generator=generator) < 0.25, n, ranks), n).max()) < ALPHA


def test_rank_uniformity_is_the_chi_squared_of_its_bins():
    ranks = torch.tensor([0, 0, 0, 0, 1, 2, 2, 2, 2, 2])[:, None]
    assert float(rank_uniformity(ranks, 2)) == pytest.approx(stats.chisquare([5, 5], [20 / 3, 10 / 3]).pvalue)


def test_tarp_coverage_is_the_share_of_truths_in_the_balls():
    """By the definition, ball by ball."""
    draws, truth, _, generator = joint(12, 4, "exact", 0)
    references = torch.randn((12, 2), generator=generator)
    levels, coverage, _ = tarp(draws, truth, references, generator)
    torch.testing.assert_close(levels, torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 1.0]))
    share = ((draws - references).norm(dim=-1) < (truth - references).norm(dim=-1)).double().mean(0)
    expected = torch.stack([(share < k / 4).double().mean() for k in range(5)] + [torch.tensor(1.0).double()])
    torch.testing.assert_close(coverage, expected)
