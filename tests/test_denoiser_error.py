"""The table of the denoiser's error against closed forms."""

import pytest
import torch

import rtb_inverse.denoiser_error
import rtb_inverse.guidance
import rtb_inverse.posterior
from priors import DiffusersPrior
from rtb_inverse import GaussianNoise, InverseProblem, NoiseRange, PoissonNoise, Posterior, importance
from rtb_inverse.chains import path_log_prob, rollout
from rtb_inverse.denoiser_error import DenoiserError, leading_correlations
from rtb_inverse.guidance import CovarianceGuidance, GradientGuidance, covariance_guidance, jacobian
from rtb_inverse.schedules import VarianceExploding
from tasks import LowDoseCT

D = torch.float64
M = 20_000


def correlated(generator, d=5):
    """A covariance and its square root."""
    root = torch.randn((d, d), generator=generator, dtype=D) / d**0.5
    return root @ root.T, root


def exact_denoiser(schedule, covariance):
    """E[x_0 | x_t] and its covariance for x_0 ~ N(0, covariance), alpha = 1."""
    eye = torch.eye(len(covariance), dtype=D)

    def gain(t):
        return torch.linalg.solve(covariance + schedule.alpha_sigma(t)[1] ** 2 * eye, covariance)

    return (lambda x, t: x @ gain(t)), (lambda t: covariance - covariance @ gain(t))


def test_measured_on_a_gaussian_it_is_the_posterior_covariance(generator):
    schedule = VarianceExploding(sigma_min=0.1, sigma_max=10.0)
    covariance, root = correlated(generator)
    denoise, truth = exact_denoiser(schedule, covariance)
    x_0 = torch.randn((M, 5), generator=generator, dtype=D) @ root.T
    error = DenoiserError.measure(schedule, denoise, x_0, 1, knots=6, generator=generator)
    assert (error.times.diff() > 0).all() and error.variance.shape == (6, 5) and error.factor.shape == (6, 5, 5)
    for t in error.times:
        found, expected = error.covariance(t), truth(t)
        variance = expected.diagonal()
        spread = ((variance[:, None] * variance + expected**2) / M) ** 0.5  # of a covariance of M Gaussian draws
        assert float(((found - expected) / spread).abs().max()) < 4.5
        torch.testing.assert_close(found.diagonal(), error(t))


def test_batch_axes_are_more_draws(generator):
    schedule = VarianceExploding(sigma_min=0.1, sigma_max=10.0)
    x_0 = torch.randn((6, 7, 2, 3), generator=generator, dtype=D)
    one = DenoiserError.measure(schedule, lambda x, t: 0.5 * x, x_0, 2, 4, generator=torch.Generator().manual_seed(1))
    two = DenoiserError.measure(schedule, lambda x, t: 0.5 * x, x_0.flatten(0, 1), 2, 4, generator=torch.Generator().manual_seed(1))
    assert one.variance.shape == (4, 2, 3) and torch.equal(one.variance, two.variance) and torch.equal(one.factor, two.factor)


def test_variances_are_linear_in_time_and_constant_beyond():
    times, variance = torch.tensor([10.0, 20.0, 40.0]), torch.tensor([1.0, 3.0, 4.0])[:, None, None, None].expand(3, 1, 8, 8)
    error = DenoiserError(times, variance)
    found = error(torch.tensor([[0.0, 10.0, 15.0], [30.0, 40.0, 99.0]]))
    truth = torch.tensor([[1.0, 1.0, 2.0], [3.5, 4.0, 4.0]], dtype=D)
    torch.testing.assert_close(found, truth[..., None, None, None].expand(2, 3, 1, 8, 8))
    assert error(torch.tensor(15.0)).shape == (1, 8, 8) and error.covariance(torch.tensor(15.0)) is None


def test_correlations_are_linear_in_time():
    factor = torch.tensor([[[1.0], [0.5]], [[1.0], [-0.1]]])
    error = DenoiserError(torch.tensor([0.0, 8.0]), torch.tensor([[4.0, 1.0]] * 2), torch.tensor([0.0, 8.0]), factor)
    for t, correlation in ((-3.0, 0.5), (0.0, 0.5), (2.0, 0.35), (8.0, -0.1), (9.0, -0.1)):
        truth = torch.tensor([[4.0, 2 * correlation], [2 * correlation, 1.0]], dtype=D)
        torch.testing.assert_close(error.covariance(torch.tensor(t)), truth)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_cut_rank_leaves_a_covariance(rank, generator):
    covariance, root = correlated(generator, 8)
    factor = leading_correlations(torch.randn((M, 8), generator=generator, dtype=D) @ root.T, rank)
    assert factor.shape == (8, rank)
    times = torch.tensor([0.0, 1.0])
    error = DenoiserError(times, covariance.diagonal().expand(2, 8), times, factor.expand(2, 8, rank))
    found = error.covariance(times[0])
    assert float(torch.linalg.eigvalsh(found).min()) > 0
    torch.testing.assert_close(found.diagonal(), covariance.diagonal())


def test_large_x_has_variances_only(monkeypatch, generator):
    monkeypatch.setattr(rtb_inverse.denoiser_error, "LARGEST", 4)
    x_0 = torch.randn((10, 5), generator=generator)
    error = DenoiserError.measure(VarianceExploding(sigma_min=0.1, sigma_max=1.0), lambda x, t: x, x_0, 1, 3, generator=generator)
    assert error.factor is None and set(error.tensors()) == {"times", "variance"}


def test_tensors_make_it_again(generator):
    x_0 = torch.randn((50, 4), generator=generator)
    error = DenoiserError.measure(VarianceExploding(sigma_min=0.1, sigma_max=1.0), lambda x, t: x / 2, x_0, 1, 5, generator=generator)
    again, t = DenoiserError(**error.tensors()), torch.tensor(0.3)
    assert torch.equal(again(t), error(t)) and torch.equal(again.covariance(t), error.covariance(t))


# Guidance by the covariance


def masked(keep, std):
    problem = InverseProblem(lambda x: x[:, keep], GaussianNoise(std), keep.shape)
    problem.mask = keep
    return problem


@pytest.mark.parametrize("beta", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["matrix", "mask"])
def test_covariance_guidance_is_the_textbook(kind, beta, generator):
    d, times = 4, torch.tensor([0.2, 0.7], dtype=D)
    covariances = {float(t): correlated(generator, d)[0] + 0.1 * torch.eye(d, dtype=D) for t in times}
    A = torch.randn((2, d), generator=generator, dtype=D)
    problem = InverseProblem(A, GaussianNoise(torch.tensor([0.3, 0.5], dtype=D)), (d,))
    if kind == "mask":
        keep = torch.tensor([True, False, True, False])
        A, problem = torch.eye(d, dtype=D)[keep], masked(keep, torch.tensor([0.3, 0.5], dtype=D))
    guide = CovarianceGuidance(problem, lambda t: covariances[float(t)], beta)
    x_0, y = torch.randn((6, 3, d), generator=generator, dtype=D), torch.randn((3, 2), generator=generator, dtype=D)
    t = times[torch.tensor([0, 1, 1, 0, 1, 0])][:, None]
    update = guide(x_0, y, None, t)
    for i in range(6):
        C = covariances[float(t[i])]
        precision = torch.linalg.inv(C) + beta * A.T @ torch.diag(problem.noise.std**-2) @ A
        left = torch.linalg.inv(precision)
        delta = (beta * (y - x_0[i] @ A.T) / problem.noise.std**2) @ A @ left
        torch.testing.assert_close(update.delta[i], delta)
        alone = guide(x_0[i], y, None, t[i, 0])
        torch.testing.assert_close(alone.delta, update.delta[i])
        torch.testing.assert_close(alone.shrink, update.shrink[i, 0])
        if kind == "mask":
            torch.testing.assert_close(update.shrink[i, 0] * C.diagonal(), left.diagonal())
        else:
            V = update.basis
            torch.testing.assert_close(V.T @ V, torch.eye(2, dtype=D))
            along = V / C.diagonal().sqrt()[:, None]
            torch.testing.assert_close(update.shrink[i, 0] * (along.T @ C @ along).diagonal(), (along.T @ left @ along).diagonal())


def test_gradient_guidance_by_a_covariance_is_the_textbook(generator):
    """Conjugate gradients to the end on an affine operator, at states of several times at once, and with beta in the covariance."""
    d, times, beta = 4, torch.tensor([0.2, 0.7], dtype=D), 3.0
    covariances = {float(t): correlated(generator, d)[0] + 0.1 * torch.eye(d, dtype=D) for t in times}
    A = torch.randn((2, d), generator=generator, dtype=D)
    problem = InverseProblem(A, GaussianNoise(torch.tensor([0.3, 0.5], dtype=D)), (d,))
    textbook = CovarianceGuidance(problem, lambda t: covariances[float(t)], beta)
    options = {"iterations": 40, "clip": None, "covariance": lambda t: beta * covariances[float(t)]}
    guide = GradientGuidance(problem, **options)
    x_0, y = torch.randn((6, 3, d), generator=generator, dtype=D), torch.randn((3, 2), generator=generator, dtype=D)
    t = times[torch.tensor([0, 1, 1, 0, 1, 0])][:, None]
    error = torch.ones((6, 1, d), dtype=D)
    torch.testing.assert_close(guide(x_0, y, error, guide.at(x_0, t)).delta, textbook(x_0, y, None, t).delta)
    alone = guide(x_0[2], y, error[2], guide.at(x_0[2], t[2, 0]))
    torch.testing.assert_close(alone.delta, textbook(x_0[2], y, None, t[2, 0]).delta)


def test_covariance_guidance_only_where_it_is_small_and_known(make_prior, monkeypatch):
    prior, measured = make_prior("unet2d", measured=False), make_prior("unet2d")
    flat, noise = torch.nn.Flatten(), GaussianNoise(0.1)

    def guide(prior, operator):
        return covariance_guidance(InverseProblem(operator, noise, prior.shape), prior, 1.0)

    assert isinstance(guide(measured, flat), CovarianceGuidance)
    assert guide(prior, flat) is None and guide(prior, torch.square) is None
    curved = guide(measured, torch.square)
    assert isinstance(curved, GradientGuidance) and curved.covariance is not None and (curved.rounds, curved.clip) == (2, 3.0)
    assert guide(measured, lambda x: x.detach() ** 2) is None  # no gradient
    counts = covariance_guidance(InverseProblem(lambda x: x.exp(), PoissonNoise(), prior.shape), measured, 1.0)
    assert isinstance(counts, GradientGuidance) and counts.covariance is not None
    monkeypatch.setattr(rtb_inverse.guidance, "COVARIANCE_LIMIT", 63 * 64)
    assert guide(measured, flat) is None and guide(measured, torch.square) is None


def test_an_element_that_never_varies_is_left_alone(generator):
    covariance = torch.diag(torch.tensor([0.5, 0.0], dtype=D))
    guide = CovarianceGuidance(masked(torch.tensor([True, True]), torch.tensor(0.3, dtype=D)), lambda t: covariance)
    x_0, y = torch.zeros((4, 1, 2), dtype=D), torch.ones((1, 2), dtype=D)
    update = guide(x_0, y, None, torch.tensor(0.5))
    torch.testing.assert_close(update.delta[0, 0], torch.tensor([0.5 / 0.59, 0.0], dtype=D))
    assert bool(torch.isfinite(update.shrink).all())


@pytest.mark.parametrize("m", [2, 6])  # fewer rows than columns, and fewer columns
def test_the_jacobian_of_a_batch(m, generator):
    A = torch.randn((m, 4), generator=generator, dtype=D)
    x = torch.randn((3, 2, 2), generator=generator, dtype=D)
    J = jacobian(lambda x: torch.sin(x.flatten(-2) @ A.T), x)
    for at, found in zip(x, J, strict=True):
        torch.testing.assert_close(found, torch.autograd.functional.jacobian(lambda u: torch.sin(A @ u.flatten()), at).flatten(1))


def test_what_is_learnt_of_an_affine_operator_is_exact(generator):
    """Of independent errors and white noise, what is left is that of the Gaussian update, whatever the pairs."""
    A, r = torch.randn((3, 5), generator=generator, dtype=D), 0.5 + torch.rand(5, generator=generator, dtype=D)
    problem = InverseProblem(A, GaussianNoise(0.4), (5,))
    x_0 = torch.randn((4, 5), generator=generator, dtype=D)
    guide = GradientGuidance(problem, iterations=5).learn(x_0, problem.simulate(x_0, generator), r)
    for scale in (1.0, 0.01):
        update = guide(x_0, problem(x_0), (scale * r**2).expand(4, 5))
        H = r[:, None] * (A.T @ A / 0.4**2) * r
        left = torch.linalg.inv(torch.eye(5, dtype=D) + scale * H)  # in units of scale r^2
        V = update.basis
        torch.testing.assert_close(torch.eye(5, dtype=D) - (V * (1 - update.shrink[0])) @ V.T, left)


def test_what_is_learnt_is_the_mean_over_pairs(generator):
    """Of one element, y = x^2 / 2: h = x^2 / sigma^2 at each pair."""
    problem = InverseProblem(lambda x: x**2 / 2, GaussianNoise(0.5), (1,))
    x_0 = torch.tensor([[0.1], [1.0], [3.0]], dtype=D)
    guide = GradientGuidance(problem, iterations=1).learn(x_0, x_0, torch.tensor([2.0], dtype=D))
    error = torch.tensor([[0.3], [1.2]], dtype=D)
    torch.testing.assert_close(guide.shrink(error), (1 / (1 + error * x_0[:, 0] ** 2 / 0.25)).mean(1, keepdim=True))


def test_a_nonlinear_problem_is_nearer_by_what_its_guide_has_learnt(generator):
    """Photon counts of 8x8 digits: a paired test over observations, at 4 standard errors (12 were seen)."""
    prior = DiffusersPrior.from_pretrained("priors/digits", steps=8)
    posterior = Posterior(prior, LowDoseCT(prior.shape, 6, photons=3000.0))
    y = posterior.problem.simulate(prior.sample(12, generator), generator)
    learnt = importance(posterior, y, 4, torch.Generator().manual_seed(0)).log_w.mean(0)
    posterior.guide.basis = None
    gain = learnt - importance(posterior, y, 4, torch.Generator().manual_seed(0)).log_w.mean(0)
    assert float(gain.mean() / gain.std()) * 12**0.5 > 4
    assert Posterior(prior, NoiseRange(InverseProblem(torch.square, GaussianNoise(1.0)), 0.1, 1.0)).guide.basis is None


def test_what_is_learnt_is_saved(generator, monkeypatch, tmp_path):
    """A posterior that is loaded where other pairs would be drawn has the densities it had."""
    prior = DiffusersPrior.from_pretrained("priors/digits", steps=3)
    posterior = Posterior(prior, LowDoseCT(prior.shape, 2, photons=100.0))
    posterior.save_pretrained(tmp_path)
    monkeypatch.setattr(rtb_inverse.posterior, "PAIRS", 1)
    loaded, other = Posterior.from_pretrained(tmp_path), Posterior(prior, LowDoseCT(prior.shape, 2, photons=100.0))
    y = posterior.problem.simulate(prior.sample(2, generator), generator)
    paths = rollout(posterior, 2, y, generator)
    assert torch.equal(path_log_prob(loaded, paths), path_log_prob(posterior, paths))
    assert not torch.allclose(path_log_prob(other, paths), path_log_prob(posterior, paths))
