"""One posterior for a range of noise levels, against the same problem with the one level."""

import math

import pytest
import torch
from scipy import stats

from priors import GaussianMixturePrior
from rtb_inverse.chains import path_log_prob, rollout
from rtb_inverse.corrections import smc, twist_log_likelihood
from rtb_inverse.diagnostics import effective_sample_size
from rtb_inverse.evaluation import evaluate, simulate_observations
from rtb_inverse.guidance import (
    DenseGuidance,
    ElementGuidance,
    GradientGuidance,
    LevelGuidance,
    MaskGuidance,
    covariance_guidance,
    guidance,
)
from rtb_inverse.lightning import fit
from rtb_inverse.noise import ComplexGaussianNoise, GaussianNoise, LaplaceNoise
from rtb_inverse.noise_range import NoiseRange
from rtb_inverse.particles import Particles
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import InverseProblem
from tasks import HDR, Deblurring, Inpainting, Lensing

D = torch.float64
MATRIX = torch.randn((3, 4), generator=torch.Generator().manual_seed(7), dtype=D)
MASK = torch.rand((1, 4, 4), generator=torch.Generator().manual_seed(3)) < 0.6
# operator and shape of x; the standard deviation at level 1
PROBLEMS = {
    "matrix": (lambda level: InverseProblem(MATRIX, GaussianNoise(level), (4,)), DenseGuidance),
    "each": (lambda level: InverseProblem(MATRIX, GaussianNoise(level * torch.tensor([0.5, 1.0, 2.0], dtype=D)), (4,)), DenseGuidance),
    "curved": (lambda level: InverseProblem(lambda x: (x**2)[..., :-1], GaussianNoise(level), (1, 4, 4)), GradientGuidance),
    "sum": (lambda level: InverseProblem(lambda x: x.sum(1).sin(), GaussianNoise(level), (4,)), GradientGuidance),
    "complex": (
        lambda level: InverseProblem(lambda x: torch.view_as_real(torch.fft.rfft(x)), ComplexGaussianNoise(level), (8,)),
        DenseGuidance,
    ),
    "mask": (lambda level: Inpainting(MASK.shape, MASK, level), MaskGuidance),
    "clipped": (lambda level: HDR((1, 4, 4), noise_std=level), ElementGuidance),
}
LEVELS = torch.tensor([0.05, 0.3, 2.0], dtype=D)


@pytest.fixture(params=PROBLEMS)
def named(request):
    """The range, what makes the problem of one level, and its guide's class."""
    make, guide = PROBLEMS[request.param]
    return NoiseRange(make(1.0), 0.05, 2.0), make, guide


def randn(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=D)


def measured(problem, generator):
    """Three measurements; of a bounded operator, far within its range."""
    measurement = randn(generator, 3, *problem.operator.y_shape)
    return measurement if problem.operator.y_range is None else 0.3 * measurement.tanh()


def test_likelihood_is_that_of_the_level(named, generator):
    problem, make, _ = named
    x, measurement = randn(generator, 5, 3, *problem.shape), measured(problem, generator)
    y = problem.observation(measurement, LEVELS)
    assert y.shape == (3, *problem.y_shape) == (3, measurement[0].numel() + 1)
    log_likelihood = problem.log_likelihood(x, y)
    for j, level in enumerate(LEVELS.tolist()):
        fixed = make(level)
        one = measurement[j : j + 1]
        torch.testing.assert_close(log_likelihood[:, j], fixed.log_likelihood(x[:, j : j + 1], one)[:, 0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(problem.residual(x, y)[:, j], fixed.residual(x[:, j : j + 1], one)[:, 0])
    torch.testing.assert_close(problem.log_likelihood(x[0], y), log_likelihood[0])


def test_simulated_levels_are_log_uniform_and_told(named, generator, assert_mean):
    problem, *_ = named
    x = randn(generator, *problem.shape)
    y = problem.simulate(x.expand(4000, *problem.shape), generator)
    measurement, log_level = problem.split(problem.check_y(y))
    assert measurement.shape == (4000, *problem.operator.y_shape) and log_level.shape == (4000,)
    assert stats.kstest(log_level, stats.uniform(math.log(0.05), math.log(40)).cdf).pvalue > 1e-4
    residual = problem.residual(x.expand(4000, *problem.shape), y)
    assert_mean(residual, 0.0)
    assert_mean(residual**2, 1.0)
    quiet = log_level < log_level.median()  # at either end alone
    assert_mean(residual[quiet] ** 2, 1.0)
    assert problem.simulate(x.expand(5, 2, *problem.shape), generator).shape == (5, 2, *problem.y_shape)


@pytest.mark.parametrize("scalar_time", [False, True])
def test_the_update_is_the_fixed_levels(named, scalar_time, generator):
    problem, make, kind = named
    guide = guidance(problem)
    assert isinstance(guide.guide if isinstance(guide, LevelGuidance) else guide, kind)
    x_0, measurement = randn(generator, 2, 3, *problem.shape), 3 * measured(problem, generator)
    error = 0.1 + torch.rand(problem.shape if scalar_time else (2, 1, *problem.shape), generator=generator, dtype=D)
    update = guide(x_0, problem.observation(measurement, LEVELS), error)
    for j, level in enumerate(LEVELS.tolist()):
        fixed = guidance(make(level))(x_0[:, j : j + 1], measurement[j : j + 1], error)
        torch.testing.assert_close(update.delta[:, j : j + 1], fixed.delta, rtol=1e-5, atol=1e-6)
        assert (update.shrink is None) == (fixed.shrink is None)
        if fixed.shrink is not None:
            shrink, other = update.shrink[..., j : j + 1, :] if fixed.basis is not None else update.shrink, fixed.shrink
            if fixed.basis is None:
                shrink = shrink.expand(2, 3, *problem.shape)[:, j]
                other = other.expand(2, 1, *problem.shape)[:, 0]
            torch.testing.assert_close(*torch.broadcast_tensors(shrink, other), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("which", ["mask", "matrix", "curved"])
def test_the_untrained_step_is_the_fixed_levels(which, make_prior, generator):
    """In float64: in float32 the curved guide answers a level that is off by its last digit with a move of 1e-3."""
    prior = make_prior("unet2d", dtype=D)

    def make(level):
        if which == "mask":
            return Inpainting(prior.shape, "half", level)
        operator = MATRIX.repeat(1, 16) if which == "matrix" else (lambda x: x**2)
        return InverseProblem(operator, GaussianNoise(level), prior.shape)

    problem = NoiseRange(make(1.0), 0.05, 2.0)
    posterior = Posterior(prior, problem)
    measurement = randn(generator, 3, *problem.operator.y_shape)
    y = problem.observation(measurement, LEVELS)
    x_t = randn(generator, 2, 3, *prior.shape)
    for j, level in enumerate(LEVELS.tolist()):
        fixed = Posterior(prior, make(level))
        if which == "curved":  # what a fixed level leaves of the variance is learnt
            fixed.guide = covariance_guidance(fixed.problem, prior, 1.0)
        for k in range(prior.steps):
            t, s = prior.times[k].expand(2, 1), prior.times[k + 1].expand(2, 1)
            with torch.no_grad():
                one, other = posterior.transition(x_t, t, s, y), fixed.transition(x_t[:, j : j + 1], t, s, measurement[j : j + 1])
            torch.testing.assert_close(one.mean[:, j], other.mean[:, 0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(one.stddev[:, j], other.stddev.expand(2, 1, *prior.shape)[:, 0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(one.log_prob(x_t)[:, j], other.log_prob(x_t[:, j : j + 1])[:, 0], rtol=1e-3, atol=1e-2)


def test_the_twist_is_the_fixed_levels(make_prior, generator):
    """Of SMC and of the twisted sampler: the likelihood, flattened by what the level's noise leaves of it."""
    prior = make_prior("unet2d", dtype=D)
    problem = NoiseRange(InverseProblem(lambda x: x**2, GaussianNoise(2.0), prior.shape), 0.05, 2.0)
    x, measurement, t = randn(generator, 2, 3, *prior.shape), randn(generator, 3, *prior.shape), prior.times[2]
    found = twist_log_likelihood(Posterior(prior, problem, "prior"), x, t, problem.observation(measurement, LEVELS))
    for j, level in enumerate(LEVELS.tolist()):
        fixed = Posterior(prior, InverseProblem(lambda x: x**2, GaussianNoise(2 * level), prior.shape), "prior")
        expected = twist_log_likelihood(fixed, x[:, j : j + 1], t, measurement[j : j + 1])
        torch.testing.assert_close(found[:, j : j + 1], expected, rtol=1e-8, atol=1e-8)


def ess_and_gap(posterior, y, generator, n=128):
    paths = rollout(posterior, n, y, generator)
    with torch.no_grad():
        log_w = path_log_prob(posterior.prior, paths) + posterior.log_likelihood(paths.x_0, y) - paths.log_prob
    return float(effective_sample_size(log_w).mean()) / n, float((Particles(paths.x_0, log_w).log_z - log_w.mean(0)).mean())


@pytest.mark.parametrize("kind", ["mixture", "gaussian"])
def test_the_untrained_posterior_is_near_at_both_ends(kind, make_prior, generator):
    """Nearly as near as the posterior of the one level."""
    prior = GaussianMixturePrior.random(2, 25, 0, steps=25) if kind == "mixture" else make_prior("gaussian", steps=15, shape=(3,))
    matrix = torch.randn((1, prior.shape[0]), generator=generator, dtype=prior._options()["dtype"])
    problem = NoiseRange(InverseProblem(matrix, GaussianNoise(1.0)), 0.1, 2.0)
    posterior = Posterior(prior, problem, width=8)
    assert posterior.start == "guided"
    x = prior.sample(6, generator)
    for level in (0.1, 2.0):
        measurement = InverseProblem(matrix, GaussianNoise(level)).simulate(x, generator)
        ess, gap = ess_and_gap(posterior, problem.observation(measurement, level), generator)
        assert ess > 0.65 and gap < 0.3
        told_wrong = problem.observation(measurement, 2.1 - level)
        paths = rollout(posterior, 128, told_wrong, generator)
        with torch.no_grad():
            log_w = path_log_prob(prior, paths) - paths.log_prob
            log_w = log_w + problem.log_likelihood(paths.x_0, problem.observation(measurement, level))
        assert float(effective_sample_size(log_w).mean()) / 128 < 0.8 * ess  # the level is what does it


def test_the_network_sees_the_level(generator):
    vector = NoiseRange(InverseProblem(MATRIX, GaussianNoise(1.0), (4,)), 0.05, 2.0)
    measurement = randn(generator, 3, 3)
    seen = vector.condition(vector.observation(measurement, LEVELS))
    assert torch.equal(seen[:, :-1], measurement)
    expected = torch.tensor([-1.0, 2 * math.log(6) / math.log(40) - 1, 1.0], dtype=D)
    torch.testing.assert_close(seen[:, -1], expected)
    image = NoiseRange(Inpainting((2, 4, 4), "box", 1.0), 0.05, 2.0)
    measurement = randn(generator, 3, *image.operator.y_shape)
    seen = image.condition(image.observation(measurement, LEVELS))
    assert torch.equal(seen[:, :-1], image.operator.condition(measurement))
    torch.testing.assert_close(seen[:, -1], expected[:, None, None].expand(3, 4, 4))


@pytest.mark.parametrize("make", [
    lambda level: HDR((1, 8, 8), noise_std=level),
    lambda level: Deblurring((1, 8, 8), size=5, noise_std=level),
    lambda level: Lensing((1, 8, 8), 8, noise_std=level),
])  # fmt: skip
def test_the_network_sees_what_the_middle_level_shows(make, generator):
    """A clipped pixel is one within a noise_std of the limit; a pseudo-inverse is regularised by the noise."""
    inner = make(1.0)
    measurement = inner(2 * torch.rand((2, 1, 8, 8), generator=generator) - 1)
    before = inner.condition(measurement)
    problem = NoiseRange(inner, 0.05, 0.5)
    seen = problem.condition(problem.observation(measurement, 0.3))[:, :-1]
    torch.testing.assert_close(seen, make(0.025**0.5).condition(measurement))
    assert not torch.allclose(seen, before, atol=1e-3) and torch.equal(inner.condition(measurement), before)


def test_a_large_measurement_is_allowed_where_the_noise_is_large():
    y = torch.full((1, 2, 2), 9.0)
    assert torch.equal(CLIPPED.split(CLIPPED.observation(y, 8.5))[0], y)


@pytest.mark.parametrize("kind", ["matrix", "mask"])
def test_it_is_saved_and_rebuilt(kind, unet2d_prior, tmp_path, generator):
    prior = unet2d_prior
    inner = Inpainting(prior.shape, "box", 1.0) if kind == "mask" else InverseProblem(MATRIX.float().repeat(1, 16), GaussianNoise(0.5))
    posterior = Posterior(prior, NoiseRange(inner, 0.05, 2.0))
    posterior.save_pretrained(tmp_path)
    again = Posterior.from_pretrained(tmp_path)
    assert type(again.problem) is NoiseRange and type(again.problem.operator) is type(inner) and posterior.problem.mask is None
    y = posterior.problem.simulate(torch.randn((3, *prior.shape), generator=generator), generator)
    one, two = (p.sample(y, 2, torch.Generator().manual_seed(0)).x for p in (posterior, again))
    assert torch.equal(one, two)
    assert InverseProblem(lambda x: x, GaussianNoise(1.0)).config is None
    assert NoiseRange(InverseProblem(lambda x: x, GaussianNoise(1.0)), 0.1, 1.0).config is None


def test_it_is_trained_corrected_and_judged(unet2d_prior, generator):
    posterior = Posterior(unet2d_prior, NoiseRange(Inpainting(unet2d_prior.shape, "box", 1.0), 0.05, 0.5))
    fit(posterior, steps=2, seed=0)
    observations = simulate_observations(posterior, 3, generator)
    report = evaluate(posterior, observations, 4, generator)
    assert all(math.isfinite(report.numbers[name].value) for name in ("elbo", "eubo", "chi_squared", "ssim"))
    assert smc(posterior, observations.y, 4, generator).x.shape == (4, 3, *unet2d_prior.shape)


RANGE = NoiseRange(InverseProblem(MATRIX, GaussianNoise(1.0), (4,)), 0.1, 2.0)
CLIPPED = NoiseRange(HDR((2, 2)), 0.1, 9.0)  # of a noise_std of 0.1
M = torch.zeros((2, 3), dtype=D)


@pytest.mark.parametrize("call, error, message", [
    (lambda: NoiseRange(RANGE.operator, 0.0, 1.0), ValueError, "low must be a finite number above 0, got 0.0"),
    (lambda: NoiseRange(RANGE.operator, 0.1, math.inf), ValueError, "high must be a finite number above 0, got inf"),
    (lambda: NoiseRange(RANGE.operator, 1.0, 1.0), ValueError, "high must be above low, got low 1.0 and high 1.0"),
    (lambda: NoiseRange(MATRIX, 0.1, 1.0), TypeError, "problem must be an InverseProblem with GaussianNoise, got one of Tensor"),
    (lambda: NoiseRange(InverseProblem(MATRIX, LaplaceNoise(1.0)), 0.1, 1.0), TypeError, "with GaussianNoise, got one of LaplaceNoise"),
    (lambda: NoiseRange(RANGE, 0.1, 1.0), TypeError, "with GaussianNoise, got one of NoiseLevel"),
    (lambda: RANGE.observation(M, 2.5), ValueError, r"y must end in the logarithm of a noise level in \[0.1, 2\] .* got level 2.5"),
    (lambda: RANGE.observation(M, torch.tensor([1.0, 0.05])), ValueError, r"noise level in \[0.1, 2\] .* got level 0.05"),
    (lambda: RANGE.observation(M, -1.0), ValueError, r"level must be a number in \[0.1, 2\], or one .* 2 measurements, got -1.0"),
    (lambda: RANGE.observation(M[:, :2], 1.0), ValueError, r"measurement must have shape \(B, 3\), got \(2, 2\)"),
    (lambda: CLIPPED.observation(torch.full((1, 2, 2), 9.0), 0.5), ValueError, r"what the operator gives, \[-1, 1\], .* got 9"),
    (lambda: RANGE.check_y(M), ValueError, r"y must have shape \(B, 4\), got \(2, 3\)"),
])  # fmt: skip
def test_bad_ranges_and_observations_get_one_clear_error(call, error, message):
    with pytest.raises(error, match=message):
        call()
