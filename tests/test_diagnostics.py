"""Diagnostics against closed forms, scipy and known truths. Statistical checks ask for |z| < 4: once in 16,000 seeds by chance."""

import json
import math

import pytest
import torch
from scipy.stats import wasserstein_distance_nd

from priors import GaussianMixturePrior
from rtb_inverse import GaussianNoise, InverseProblem, Observations, Posterior, evaluate, importance, observe, simulate_observations
from rtb_inverse.diagnostics import (
    Estimate,
    effective_sample_size,
    interval_coverage,
    interval_level,
    log_mean_weight,
    psnr,
    sliced_wasserstein,
    total_variation,
)

NOISE = 0.5


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
