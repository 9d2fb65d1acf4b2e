"""Noise models against scipy's densities, sums and integrals, and their own draws; what the guides make of them.

Monte-Carlo comparisons fail at 4.5 standard errors: a right one does so once in 150,000, this file makes fewer than 500."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit, logsumexp

from priors import GaussianMixturePrior
from rtb_inverse import noise as models
from rtb_inverse.chains import Prior, path_log_prob, rollout
from rtb_inverse.checkpoints import WEIGHTS, load_weights
from rtb_inverse.diagnostics import effective_sample_size
from rtb_inverse.guidance import DenseGuidance, GradientGuidance, guidance
from rtb_inverse.noise import (
    BernoulliNoise,
    ComplexGaussianNoise,
    CorrelatedGaussianNoise,
    GaussianNoise,
    LaplaceNoise,
    LogNormalNoise,
    NegativeBinomialNoise,
    Noise,
    PoissonGaussianNoise,
    PoissonNoise,
    QuantisedNoise,
    StudentTNoise,
    noise_from_config,
)
from rtb_inverse.particles import Particles
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import InverseProblem
from tasks import exact_problem

D = torch.float64
EACH = torch.tensor([0.4, 1.0, 2.5], dtype=D)  # one for each element of y
C = torch.tensor([[1.0, 0.5, 0.1], [0.5, 2.0, -0.3], [0.1, -0.3, 0.5]], dtype=D)
N = EACH.numpy()
EDGES = torch.tensor([-0.5, 0.7, 1.0, 2.5, 3.0], dtype=D)


def poisson_gaussian(y, clean, std, gain, background):
    """Over all counts that could matter."""
    y, rate, std = (np.asarray(value)[..., None] for value in (y, gain * clean + background, std))
    k = np.arange(600)
    return logsumexp(stats.poisson.logpmf(k, rate) + stats.norm.logpdf(y, k, std), axis=-1)


def quantised(y, clean, std):
    ends = np.concatenate([[-np.inf], EDGES.numpy(), [np.inf]])
    a, b = ((ends[y.astype(int) + j] - clean) / std for j in (0, 1))
    return np.log(np.where(a > 0, stats.norm.sf(a) - stats.norm.sf(b), stats.norm.cdf(b) - stats.norm.cdf(a)))


def negative_binomial(y, mean, r):
    return stats.nbinom.logpmf(y, r, r / (r + mean))


# name: model, and its log-density of arrays (y, clean), element by element
MODELS = {
    "gaussian": (GaussianNoise(0.3), lambda y, a: stats.norm.logpdf(y, a, 0.3)),
    "gaussian, each": (GaussianNoise(EACH), lambda y, a: stats.norm.logpdf(y, a, N)),
    "laplace": (LaplaceNoise(0.6), lambda y, a: stats.laplace.logpdf(y, a, 0.6)),
    "laplace, each": (LaplaceNoise(EACH), lambda y, a: stats.laplace.logpdf(y, a, N)),
    "student": (StudentTNoise(12, 0.7), lambda y, a: stats.t.logpdf(y, 12, a, 0.7)),
    "student, each": (StudentTNoise(10 + EACH, EACH), lambda y, a: stats.t.logpdf(y, 10 + N, a, N)),
    "log-normal": (LogNormalNoise(0.4), lambda y, a: stats.lognorm.logpdf(y, 0.4, scale=a)),
    "poisson": (PoissonNoise(), lambda y, a: stats.poisson.logpmf(y, a)),
    "poisson, peak": (PoissonNoise(EACH * 20, 0.5), lambda y, a: stats.poisson.logpmf(y, 20 * N * a + 0.5)),
    "poisson-gaussian": (PoissonGaussianNoise(1.3, 4.0, EACH), lambda y, a: poisson_gaussian(y, a, 1.3, 4.0, N)),
    "poisson-gaussian, each": (PoissonGaussianNoise(EACH / 4), lambda y, a: poisson_gaussian(y, a, N / 4, 1.0, 0.0)),
    "negative binomial": (NegativeBinomialNoise(3.5), lambda y, a: negative_binomial(y, a, 3.5)),
    "negative binomial, peak": (NegativeBinomialNoise(EACH, 7.0, 1.0), lambda y, a: negative_binomial(y, 7 * a + 1, N)),
    "bernoulli": (BernoulliNoise(), lambda y, a: stats.bernoulli.logpmf(y, expit(a))),
    "quantised": (QuantisedNoise(0.8, EDGES), lambda y, a: quantised(y, a, 0.8)),
    "quantised, each": (QuantisedNoise(EACH, EDGES), lambda y, a: quantised(y, a, N)),
}
JOINT = {"correlated": CorrelatedGaussianNoise(C)}
ALL = {name: model for name, (model, _) in MODELS.items()} | JOINT
DISCRETE = {name: model for name, model in ALL.items() if model.support.startswith(("counts", "0 or 1", "the number"))}


def clean(generator, *shape):
    """Of every model's domain."""
    return 0.1 + 3 * torch.rand(shape, generator=generator, dtype=D)


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3), (2, 3, 2, 3)])
@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("name", MODELS)
def test_log_density_is_scipys(name, dtype, shape, generator):
    """On its own draws and, broadcast, on those of another."""
    model, truth = MODELS[name]
    a = clean(generator, *shape).to(dtype)
    for y in (model.sample(a, generator), model.sample(a, generator)[0]):
        theirs = torch.as_tensor(truth(y.double().numpy(), a.double().numpy()), dtype=D).expand(shape)
        ours = model.log_prob(a, y, 2)
        assert ours.dtype == dtype and ours.shape == shape[:-2]
        tolerance = 1e-10 if dtype == D else 1e-5
        torch.testing.assert_close(ours.double(), theirs.sum((-2, -1)), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(model.log_prob(a, y, 0).double(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("y_shape", [(3,), (2, 2)])
def test_correlated_density_is_scipys(y_shape, generator):
    d = math.prod(y_shape)
    root = torch.randn((d, d), generator=generator, dtype=D)
    matrix = root @ root.T + 0.1 * torch.eye(d, dtype=D)
    model = CorrelatedGaussianNoise(matrix.reshape(*y_shape, *y_shape))
    a, y = (torch.randn((*batch, *y_shape), generator=generator, dtype=D) for batch in ((4, 2), (2,)))
    ours = model.log_prob(a, y, len(y_shape))
    for i in range(4):
        for j in range(2):
            truth = stats.multivariate_normal.logpdf(y[j].flatten(), a[i, j].flatten(), matrix)
            assert float(ours[i, j]) == pytest.approx(truth, rel=1e-10)
    white = model.whiten(a, y - a).flatten(2)
    torch.testing.assert_close(
        white.square().sum(-1), torch.einsum("...i,ij,...j", (y - a).flatten(2), matrix.inverse(), (y - a).flatten(2))
    )


def test_complex_noise_is_circular(generator, assert_mean):
    model, z = ComplexGaussianNoise(torch.tensor([0.5, 2.0], dtype=D)), torch.randn((2, 2), generator=generator, dtype=D)
    y = model.sample(z.expand(20_000, 2, 2), generator)
    n = torch.view_as_complex(y - z)
    assert_mean(n.abs() ** 2, [0.25, 4.0])
    assert_mean((n**2).real, 0.0)
    assert_mean((n**2).imag, 0.0)
    theirs = -(n.abs() ** 2) / torch.tensor([0.25, 4.0]) - torch.log(torch.pi * torch.tensor([0.25, 4.0]))  # its density in the plane
    torch.testing.assert_close(model.log_prob(z, y, 2), theirs.sum(-1), rtol=1e-6, atol=1e-6)


def test_complex_measurements_are_real_views(generator):
    def spectrum(x):
        return torch.view_as_real(torch.fft.rfft(x))

    problem = InverseProblem(spectrum, ComplexGaussianNoise(0.5), (8,))
    assert problem.y_shape == (5, 2) and problem.linear and isinstance(guidance(problem), DenseGuidance)
    with pytest.raises(TypeError, match=r"floating-point tensor, got torch.complex64; torch.view_as_real makes one"):
        InverseProblem(torch.fft.rfft, ComplexGaussianNoise(0.5), (8,))
    with pytest.raises(ValueError, match=r"last axis of 2 \(torch.view_as_real\) for ComplexGaussianNoise, got \(1, 3\)"):
        InverseProblem(lambda x: x, ComplexGaussianNoise(0.5)).simulate(torch.zeros(1, 3))


@pytest.mark.parametrize("name", [*MODELS])
def test_densities_are_normalised(name):
    model, a = ALL[name], torch.tensor([0.3, 1.7, 2.4], dtype=D)
    if name in DISCRETE:
        most = {"bernoulli": 1, "quantised": len(EDGES), "quantised, each": len(EDGES)}.get(name, 2000)
        mass = model.log_prob(a, torch.arange(most + 1, dtype=D)[:, None], 0).exp().sum(0)
    else:
        grid = torch.linspace(-60, 60, 240_001, dtype=D)[:, None]
        density = model.log_prob(a, grid, 0).exp()
        mass = torch.trapezoid(density, grid, dim=0)
    torch.testing.assert_close(mass, torch.ones(3, dtype=D), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("name", ALL)
def test_draws_have_the_mean_and_the_variance(name, dtype, generator, assert_mean):
    model, a = ALL[name], clean(generator, 2, 3).to(dtype)
    y = model.sample(a.expand(20_000, 2, 3), generator)
    mean, variance = model.mean(a), model.variance(a)
    assert y.dtype == mean.dtype == variance.dtype == dtype and mean.shape == variance.shape == a.shape
    assert_mean(y, mean)
    assert_mean((y.double() - mean) ** 2, variance)
    residual = model.whiten(a, y - mean)
    assert_mean(residual**2, 1.0)
    assert_mean(residual[..., 0] * residual[..., 1], 0.0)
    model.check(y)


@pytest.mark.parametrize("model, law", [(StudentTNoise(1.0, 0.7), stats.cauchy(0.4, 0.7)), (LaplaceNoise(0.5), stats.laplace(0.4, 0.5))])
def test_draws_with_heavy_tails_follow_the_law(model, law, generator):
    y = model.sample(torch.full((5000,), 0.4, dtype=D), generator)
    assert stats.kstest(y, law.cdf).pvalue > 1e-4


def test_student_without_a_variance_has_the_inverse_fisher_information(assert_mean, generator):
    df = torch.tensor([1.0, 2.0, 2.0001, 5.0], dtype=D)
    variance = StudentTNoise(df, 0.5).variance(torch.zeros(4, dtype=D))
    torch.testing.assert_close(variance[2:], 0.25 * df[2:] / (df[2:] - 2))
    torch.testing.assert_close(variance[:2], 0.25 * (df[:2] + 3) / (df[:2] + 1))
    assert StudentTNoise(1.0, 0.5).mean(torch.tensor([3.0])) == 3.0
    a = torch.zeros((20_000, 2), dtype=D, requires_grad=True)
    model = StudentTNoise(df[:2], 0.5)
    (score,) = torch.autograd.grad(model.log_prob(a, model.sample(a.detach(), generator), 2), a)
    assert_mean(score**2, 1 / variance[:2])


@pytest.mark.parametrize("name", ALL)
def test_draws_depend_on_the_generator_alone(name):
    model, a = ALL[name], torch.full((50, 3), 1.5, dtype=D)
    before = torch.get_rng_state()
    one, two, other = (model.sample(a, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ALL)
def test_draws_and_observations_broadcast(name, generator):
    """clean (N, B, m) with y (B, m) is a loop."""
    model, a = ALL[name], clean(generator, 4, 2, 3)
    y = model.sample(a[0], generator)
    together = model.log_prob(a, y, 1)
    assert together.shape == (4, 2)
    for i in range(4):
        for j in range(2):
            torch.testing.assert_close(together[i, j], model.log_prob(a[i, j], y[j], 1))


# At the edges


def test_what_cannot_be_seen_has_no_density():
    cases = [
        (PoissonNoise(), 1.0, 0.5), (PoissonNoise(), 1.0, -1.0), (PoissonNoise(), 0.0, 1.0), (PoissonNoise(), -1.0, 0.0),
        (NegativeBinomialNoise(2.0), 0.0, 1.0), (PoissonGaussianNoise(1.0), -1.0, 0.0), (LogNormalNoise(1.0), 1.0, 0.0),
        (LogNormalNoise(1.0), -1.0, 1.0), (BernoulliNoise(), 0.0, 0.5), (QuantisedNoise(1.0, EDGES), 0.0, 6.0),
        (QuantisedNoise(1.0, EDGES), 0.0, -1.0),
    ]  # fmt: skip
    for model, a, y in cases:
        assert model.log_prob(torch.tensor([a]), torch.tensor([y]), 1) == -torch.inf, (model, a, y)


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("model, a, y, truth", [
    (PoissonNoise(), 0.0, 0.0, 0.0),
    (NegativeBinomialNoise(2.0), 0.0, 0.0, 0.0),
    (PoissonNoise(), 1e6, 1.001e6, stats.poisson.logpmf(1.001e6, 1e6)),
    (PoissonGaussianNoise(0.5), 0.0, 1.0, stats.norm.logpdf(1.0, 0.0, 0.5)),
    (PoissonGaussianNoise(0.5), 0.0, 30.0, stats.norm.logpdf(30.0, 0.0, 0.5)),
    (PoissonGaussianNoise(0.3), 100.0, 20.0, poisson_gaussian(np.array(20.0), 100.0, 0.3, 1.0, 0.0)),
    (PoissonGaussianNoise(5.0), 100.0, -40.0, poisson_gaussian(np.array(-40.0), 100.0, 5.0, 1.0, 0.0)),
    (PoissonGaussianNoise(5.0), 3.0, 200.0, poisson_gaussian(np.array(200.0), 3.0, 5.0, 1.0, 0.0)),
    (PoissonGaussianNoise(40.0), 300.0, 300.0, poisson_gaussian(np.array(300.0), 300.0, 40.0, 1.0, 0.0)),
    (PoissonGaussianNoise(2.0), 1e6, 1e6, -0.5 * math.log(2 * math.pi * (1e6 + 4))),
    (BernoulliNoise(), -200.0, 1.0, -200.0),
    (QuantisedNoise(0.1, EDGES), 50.0, 5.0, 0.0),
    (QuantisedNoise(0.1, EDGES), 50.0, 0.0, stats.norm.logcdf(-505.0)),
    (QuantisedNoise(0.1, EDGES), -50.0, 5.0, stats.norm.logcdf(-530.0)),
    (QuantisedNoise(1.0, EDGES), -30.0, 2.0, stats.norm.logcdf(-30.7)),
    (QuantisedNoise(1.0, EDGES), 30.0, 4.0, stats.norm.logcdf(-27.0)),
    (QuantisedNoise(100.0, EDGES), 0.0, 2.0, math.log(0.3 / 100) + stats.norm.logpdf(0.0085)),
    (QuantisedNoise(1e4, EDGES), 0.0, 4.0, math.log(0.5 / 1e4) + stats.norm.logpdf(2.75e-4)),
])  # fmt: skip
def test_far_out_densities_are_exact_and_have_gradients(model, a, y, truth, dtype):
    a = torch.tensor([a], dtype=dtype, requires_grad=True)
    log_prob = model.log_prob(a, torch.tensor([y], dtype=dtype), 1)
    assert float(log_prob.detach()) == pytest.approx(float(truth), rel=1e-4, abs=1e-6)
    log_prob.backward()
    assert torch.isfinite(a.grad).all()


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("correlated",)])
def test_gradients_are_differences(name, generator):
    model, a = ALL[name], clean(generator, 4, 3)
    y, step = model.sample(a, generator), 1e-6
    a.requires_grad_()
    (gradient,) = torch.autograd.grad(model.log_prob(a, y, 2), a)
    difference = (model.log_prob(a + step, y, 0) - model.log_prob(a - step, y, 0)) / (2 * step)
    torch.testing.assert_close(gradient, difference.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model, y, message", [
    (PoissonNoise(), 0.5, r"y must be counts, 0, 1, 2, ..., for PoissonNoise, got 0.5 \(1 such elements\)"),
    (PoissonNoise(), -1.0, "y must be counts, .* for PoissonNoise, got -1"),
    (NegativeBinomialNoise(2.0), 1.5, "y must be counts, .* for NegativeBinomialNoise, got 1.5"),
    (LogNormalNoise(1.0), 0.0, "y must be above 0 for LogNormalNoise, got 0"),
    (BernoulliNoise(), 2.0, "y must be 0 or 1 for BernoulliNoise, got 2"),
    (QuantisedNoise(1.0, EDGES), 6.0, "y must be the number of a bin, .* for QuantisedNoise, got 6"),
    (QuantisedNoise(1.0, EDGES), 0.5, "y must be the number of a bin, .* for QuantisedNoise, got 0.5"),
    (GaussianNoise(1.0), math.nan, "y must be finite, got NaN"),
])  # fmt: skip
def test_observations_off_the_support_get_one_clear_error(model, y, message):
    problem = InverseProblem(torch.exp, model, (3,))
    observed = torch.ones(2, 3)
    assert problem.check_y(observed) is observed
    observed[1, 2] = y
    with pytest.raises(ValueError, match=message):
        problem.check_y(observed)


@pytest.mark.parametrize("model, message", [
    (PoissonNoise(2.0, 1.0), r"operator's output must be at least -background / gain for PoissonNoise, got -0.75"),
    (PoissonGaussianNoise(1.0), "operator's output must be at least -background / gain for PoissonGaussianNoise, got -0.75"),
    (LogNormalNoise(1.0), "operator's output must be above 0 for LogNormalNoise, got -0.75"),
    (CorrelatedGaussianNoise(C), r"operator's output must end in the covariance's shape \(3,\) for CorrelatedGaussianNoise, got \(1, 2\)"),
])  # fmt: skip
def test_clean_measurements_off_the_domain_get_one_clear_error(model, message):
    with pytest.raises(ValueError, match=message):
        InverseProblem(lambda x: x, model).simulate(torch.tensor([[1.0, -0.75]]))


@pytest.mark.parametrize("model, message", [
    (GaussianNoise(torch.ones(5)), r"noise_std of GaussianNoise must be a number or broadcast to y, \(3,\), got shape \(5,\)"),
    (GaussianNoise(torch.ones(5, 1)), r"noise_std of GaussianNoise must be .* got shape \(5, 1\)"),
    (StudentTNoise(3.0, torch.ones(2)), r"scale of StudentTNoise must be .* got shape \(2,\)"),
    (QuantisedNoise(torch.ones(4), EDGES), r"noise_std of QuantisedNoise must be .* got shape \(4,\)"),
    (CorrelatedGaussianNoise(torch.eye(2)), r"covariance must be of y, \(3,\) twice, got shape \(2, 2\)"),
])  # fmt: skip
def test_parameters_of_another_shape_get_one_clear_error(model, message):
    with pytest.raises(ValueError, match=message):
        InverseProblem(lambda x: x, model, (3,))
    assert InverseProblem(lambda x: x[..., None] * torch.ones(2), GaussianNoise(torch.ones(3, 1)), (3,)).y_shape == (3, 2)


@pytest.mark.parametrize("make, error, message", [
    (lambda: LaplaceNoise(0.0), ValueError, "scale must be finite and above 0, got 0.0"),
    (lambda: StudentTNoise(-1.0, 1.0), ValueError, "df must be finite and above 0, got -1.0"),
    (lambda: StudentTNoise(3.0, torch.tensor([1.0, math.inf])), ValueError, r"scale must be finite and above 0, got \[1.0, inf\]"),
    (lambda: LogNormalNoise("a"), TypeError, "noise_std must be a number or a tensor, got 'a'"),
    (lambda: PoissonNoise(0.0), ValueError, "gain must be finite and above 0, got 0.0"),
    (lambda: PoissonNoise(1.0, -0.1), ValueError, "background must be finite and at least 0, got -0.1"),
    (lambda: PoissonNoise(torch.ones(1, dtype=torch.complex64)), TypeError, "gain must be a number or a tensor"),
    (lambda: PoissonGaussianNoise(math.nan), ValueError, "noise_std must be finite and above 0, got nan"),
    (lambda: NegativeBinomialNoise(0), ValueError, "total_count must be finite and above 0, got 0.0"),
    (lambda: QuantisedNoise(0.0, EDGES), ValueError, "noise_std must be finite and above 0"),
    (lambda: QuantisedNoise(1.0, [0.0]), TypeError, r"edges must be a floating-point tensor, got \[0.0\]"),
    (lambda: QuantisedNoise(1.0, EDGES.flip(0)), ValueError, r"edges must be finite and increasing, of shape \(L,\) with L >= 1, got \[3"),
    (lambda: CorrelatedGaussianNoise(1.0), TypeError, "covariance must be a floating-point tensor, got 1.0"),
    (lambda: CorrelatedGaussianNoise(C[:2]), ValueError, r"covariance must have shape \(\*y_shape, \*y_shape\), got \(2, 3\)"),
    (lambda: CorrelatedGaussianNoise(-C), ValueError, "positive definite, got one of smallest eigenvalue -2"),
    (lambda: CorrelatedGaussianNoise(C + C.tril(-1)), ValueError, "symmetric and positive definite, got one .* asymmetry 0.5"),
    (lambda: noise_from_config({"class": "Mine"}, {}), ValueError, "config names the noise model 'Mine', expected one of GaussianNoise, "),
])  # fmt: skip
def test_bad_parameters_get_one_clear_error(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Saved and rebuilt


@pytest.mark.parametrize("name", [*ALL, "complex"])
def test_a_problem_with_it_is_saved_and_rebuilt(name, tmp_path, generator):
    model = ComplexGaussianNoise(0.5) if name == "complex" else ALL[name]
    prior = GaussianMixturePrior(*(c.to(D) for c in (torch.ones(1), torch.full((1, 3), 5.0), 0.01 * torch.eye(3)[None])), steps=2)
    problem = InverseProblem(torch.eye(3, dtype=D), model)
    if name == "complex":
        problem = InverseProblem(torch.eye(3, dtype=D), GaussianNoise(ComplexGaussianNoise(0.5).std))
        assert model.config == problem.noise.config
    posterior = Posterior(prior, problem, start="prior", width=8)
    posterior.save_pretrained(tmp_path)
    again = Posterior.from_pretrained(tmp_path)
    assert type(again.problem.noise) is type(problem.noise)
    x = clean(generator, 5, 2, 3)
    y = model.sample(x[0], generator) if name != "complex" else x[0]
    assert torch.equal(again.log_likelihood(x, y), posterior.log_likelihood(x, y))


def test_every_model_is_registered():
    exported = {value for value in vars(models).values() if isinstance(value, type) and issubclass(value, Noise)}
    assert set(models.NOISES.values()) == exported - {Noise, models.RateNoise}

    class Mine(GaussianNoise):
        pass

    assert Mine(0.1).config is None and InverseProblem(C, Mine(0.1)).config is None


def test_of_a_guide_of_gradients_what_it_has_learnt_is_saved(unet2d_prior, tmp_path, generator):
    """And nothing of the problem that it is made of."""
    problem = InverseProblem(lambda x: torch.exp(x / 2), PoissonNoise(3.0))
    posterior = Posterior(unet2d_prior, problem)
    assert isinstance(posterior.guide, GradientGuidance) and posterior.start == "guided"
    posterior.save_pretrained(tmp_path)
    learnt = {name for name in load_weights(tmp_path / WEIGHTS) if name.startswith("guide")}
    assert learnt == {"guide.basis", "guide.seen", "guide.weight"}
    again = Posterior.from_pretrained(tmp_path, problem=problem)
    x_t, t, y = torch.randn((2, 3, 1, 8, 8), generator=generator), posterior.times[1], torch.ones(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(again.denoise(x_t, t, y)[0], posterior.denoise(x_t, t, y)[0])


# What the guides make of it


@pytest.mark.parametrize("name", ALL)
def test_the_guide_is_the_gaussian_of_mean_and_variance_at_the_estimate(name, generator):
    """Against dense linear algebra, with the Jacobian of the mean by autograd and the variance as it is at the estimate."""
    model, A = ALL[name], torch.rand((3, 4), generator=generator, dtype=D)
    problem = InverseProblem(lambda x: x.exp() @ A.to(x.dtype).T, model, (4,))
    guide = GradientGuidance(problem, iterations=40, clip=None)
    x_0, error = 0.3 * torch.randn((2, 3, 4), generator=generator, dtype=D), 0.1 + torch.rand((2, 1, 4), generator=generator, dtype=D)
    y = model.sample(problem(x_0[0]), generator)
    update = guide(x_0, y, error)
    for i in range(2):
        for j in range(3):
            a, R = problem(x_0[i, j]), torch.diag(error[i, 0])
            J = torch.autograd.functional.jacobian(lambda x: model.mean(problem(x)), x_0[i, j])
            noise_covariance = C if name == "correlated" else torch.diag(model.variance(a))
            delta = R @ J.T @ torch.linalg.solve(J @ R @ J.T + noise_covariance, y[j] - model.mean(a))
            torch.testing.assert_close(update.delta[i, j], delta, rtol=1e-6, atol=1e-8)


def test_guides_by_noise_and_operator():
    A, shape = torch.rand((3, 4), dtype=D), (4,)
    linear, curved = guidance(InverseProblem(A, LaplaceNoise(0.1), shape)), guidance(InverseProblem(torch.exp, PoissonNoise(), shape))
    assert isinstance(linear, GradientGuidance) and (linear.iterations, linear.clip) == (5, 3.0)
    assert isinstance(curved, GradientGuidance) and (curved.iterations, curved.rounds, curved.clip) == (5, 2, 3.0)
    assert guidance(InverseProblem(lambda x: x.detach().exp(), PoissonNoise(), shape)) is None


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("model", [PoissonNoise(1e3), BernoulliNoise(), QuantisedNoise(1e-3, EDGES), LogNormalNoise(0.1)])
def test_the_guide_is_finite_where_nothing_varies(model, dtype):
    """Rates of 1e-12, logits of 60, noise far below a bin."""
    problem = InverseProblem(lambda x: torch.exp(x), model, (4,))
    x_0 = torch.tensor([-28.0, 4.1, 0.0, -5.0], dtype=dtype)[None, None]
    delta = guidance(problem)(x_0, torch.ones((1, 4), dtype=dtype), torch.full((4,), 0.5, dtype=D)).delta
    assert torch.isfinite(delta).all() and float(delta.square().mean()) <= 9 * 0.5 + 1e-6


class Opaque(Prior):
    """Another prior's denoiser in Gaussian steps: a posterior knows no more of it than of a network's."""

    def __init__(self, prior):
        super().__init__(prior.shape, prior.schedule, prior.steps)
        self.prior = prior

    def denoise(self, x_t, t):
        return self.prior.denoise(x_t, t)

    def denoiser_error(self, t):
        return self.prior.denoiser_error(t)


def gap_and_ess(posterior, y, generator, n=256):
    """log Z - ELBO, and the effective sample size of the path weights as a share, both (B,)."""
    paths = rollout(posterior, n, y, generator)
    with torch.no_grad():
        log_w = path_log_prob(posterior.prior, paths) + posterior.log_likelihood(paths.x_0, y) - paths.log_prob
    return Particles(paths.x_0, log_w).log_z - log_w.mean(0), effective_sample_size(log_w) / n


def assert_smaller(one, other):
    """Pair by pair, by three standard errors of the mean difference."""
    difference = other - one
    assert float(difference.mean()) > 3 * float(difference.std()) / len(difference) ** 0.5


def test_counts_guide_a_prior_of_unknown_kind(generator):
    problem = InverseProblem(lambda x: 0.5 + 2 * torch.nn.functional.softplus(x), PoissonNoise(5.0))
    prior = Opaque(GaussianMixturePrior.random(4, 3, 0, steps=20))
    gaps = {}
    for start in ("guided", "prior"):
        posterior = Posterior(prior, problem, start=start, width=8)
        assert posterior.references is None and isinstance(posterior.guide, GradientGuidance)
        y = problem.simulate(prior.sample(6, torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2))
        gaps[start] = gap_and_ess(posterior, y, generator)[0]
    assert_smaller(gaps["guided"], gaps["prior"])


def test_references_and_the_guide_are_better_than_references_alone(generator, monkeypatch):
    gaps = {}
    for way in ("both", "references"):
        if way == "references":
            monkeypatch.setattr("rtb_inverse.posterior.guidance", lambda *_: None)
        exact = exact_problem("poisson2", steps=20)
        problem = InverseProblem(exact.problem.operator, PoissonNoise(20.0))
        posterior = Posterior(exact.prior, problem, width=8)
        y = problem.simulate(exact.prior.sample(24, torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2))
        gaps[way] = gap_and_ess(posterior, y, generator)[0]
    assert_smaller(gaps["both"], gaps["references"])
