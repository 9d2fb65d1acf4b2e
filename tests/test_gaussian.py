"""The Gaussian prior against torch's MultivariateNormal, Bayes' rule pointwise and numpy's linear algebra; and test number one: the RTB
residual of the exact posterior chain, and of the guided posterior as it starts, is zero on every path."""

import itertools

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from priors import GaussianMixturePrior, GaussianPrior
from rtb_inverse.chains import Prior, Trajectory, initial_log_prob, path_log_prob, renoise, rollout
from rtb_inverse.corrections import importance, smc
from rtb_inverse.guidance import GaussianGuidance, affine
from rtb_inverse.lightning import fit
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem
from tasks import Inpainting

M, D = 20_000, torch.float64
SHAPES = [(3,), (2, 3), (1, 2, 2)]


def truth(prior, t):
    """p(x_t) of flattened x_t by torch, from the covariance matrix itself."""
    alpha, sigma = prior.schedule.alpha_sigma(t)
    covariance = alpha**2 * prior.covariance + sigma**2 * torch.eye(prior.shape.numel(), dtype=D)
    return MultivariateNormal(alpha * prior.mean.flatten(prior.mean.ndim - len(prior.shape)), covariance)


def exactly(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-10)


@pytest.fixture(params=SHAPES, ids=str)
def gaussian(request, schedule, make_prior):
    return make_prior("gaussian", schedule, steps=6, shape=request.param)


def observed(prior, generator, m=2, b=3):
    A = torch.randn((m, prior.shape.numel()), generator=generator, dtype=D)
    return A, 3 * torch.randn((b, m), generator=generator, dtype=D)


# The chain


def test_transitions_are_bayes_rule_pointwise(gaussian, generator):
    """p(x_s) q(x_t | x_s) = p(x_t) p(x_s | x_t), wherever, between neighbours and across the whole grid."""
    times = gaussian.times
    for t, s in [*itertools.pairwise(times), (times[0], times[-1]), (times[1], times[4])]:
        a, b = gaussian.schedule.forward_step(s, t)
        x_s = 2 * torch.randn((5, 4, *gaussian.shape), generator=generator, dtype=D)
        x_t = a * x_s + 1.5 * b * torch.randn(x_s.shape, generator=generator, dtype=D)
        forward = MultivariateNormal(a * x_s.flatten(2), b**2 * torch.eye(gaussian.shape.numel(), dtype=D))
        left = truth(gaussian, s).log_prob(x_s.flatten(2)) + forward.log_prob(x_t.flatten(2))
        right = truth(gaussian, t).log_prob(x_t.flatten(2)) + gaussian.transition(x_t, t, s).log_prob(x_s)
        exactly(left, right, atol=1e-8)


def test_initial_and_distribution_are_the_marginals(gaussian, generator):
    x = 2 * torch.randn((4, 2, *gaussian.shape), generator=generator, dtype=D)
    exactly(gaussian.initial((4, 2)).log_prob(x), truth(gaussian, gaussian.times[0]).log_prob(x.flatten(2)))
    exactly(gaussian.distribution.log_prob(x), truth(gaussian, torch.tensor(-1.0)).log_prob(x.flatten(2)))


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_chain_draws_the_gaussian_at_any_number_of_steps(steps, schedule, make_prior, generator, assert_mean):
    prior = make_prior("gaussian", schedule, steps=steps)
    for x in (rollout(prior, M, generator=generator).x_0[:, 0], prior.sample(M, generator)):
        residual = (x - prior.mean).flatten(1)
        assert_mean(residual, 0.0)
        assert_mean(residual[:, :, None] * residual[:, None, :], prior.covariance)


def test_it_is_a_mixture_of_one(generator):
    """The same chain, by another road."""
    one = GaussianMixturePrior.random(3, 1, 0, D, steps=5)
    prior = GaussianPrior(one.means[0], one.covariances[0], steps=5)
    x, z = torch.randn((2, 4, 2, 3), generator=generator, dtype=D)
    t, s = prior.times[:4, None], prior.times[1:, None][:4]
    exactly(prior.transition(x, t, s).log_prob(z), one.transition(x, t, s).log_prob(z))
    exactly(prior.denoise(x, t), one.denoise(x, t))
    A, y = observed(prior, generator)
    exactly(prior.log_evidence(A, 0.3, y), one.log_evidence(A, 0.3, y))


def test_what_is_left_of_the_error(gaussian, generator):
    """r_t^2 and C_t are those of the exact last step, and of the denoiser's derivative (Tweedie's second formula)."""
    rows = torch.randn((2, gaussian.shape.numel()), generator=generator, dtype=D)
    x_t = torch.randn((3, 2, *gaussian.shape), generator=generator, dtype=D)
    for t in gaussian.times[1:-1]:
        exactly(gaussian.transition(x_t, t, gaussian.times[-1]).variance, gaussian.denoiser_error(t).expand(x_t.shape))
        C = gaussian.denoiser_covariance(t)
        exactly(C.diagonal().reshape(gaussian.shape), gaussian.denoiser_error(t))
        exactly(gaussian.local_covariance(x_t, t, rows), (C @ rows.T).expand(3, 2, -1, 2))
        exactly(gaussian.local_covariance(x_t, t, rows), Prior.local_covariance(gaussian, x_t, t, rows), atol=1e-8)
    times = gaussian.times[:3, None]
    assert gaussian.denoiser_error(times).shape == (3, 1, *gaussian.shape)
    exactly(gaussian.denoiser_error(times)[1, 0], gaussian.denoiser_error(times[1, 0]))
    exactly(gaussian.local_covariance(x_t, times, rows)[1, 0], gaussian.local_covariance(x_t[1, 0], times[1, 0], rows))


# The exact posterior


def test_posterior_is_numpys_conditional(gaussian, generator):
    """In the information form, (C^-1 + A^T A / sigma^2)^-1, and as a block of the joint Gaussian of (x, y)."""
    A, y = observed(gaussian, generator)
    std = torch.tensor([0.3, 0.7], dtype=D)
    posterior = gaussian.posterior(A, std, y)
    assert posterior.mean.shape == (3, *gaussian.shape) and posterior.shape == gaussian.shape
    C, H, m = gaussian.covariance.numpy(), A.numpy(), gaussian.mean.flatten().numpy()
    precision = np.linalg.inv(C) + H.T @ np.diag(std.numpy() ** -2.0) @ H
    np.testing.assert_allclose(posterior.covariance.numpy(), np.linalg.inv(precision), rtol=1e-8, atol=1e-10)
    for b in range(3):
        mean = np.linalg.solve(precision, np.linalg.solve(C, m) + H.T @ (y[b].numpy() / std.numpy() ** 2))
        np.testing.assert_allclose(posterior.mean[b].flatten().numpy(), mean, rtol=1e-8, atol=1e-8)
    S = A @ gaussian.covariance @ A.T + torch.diag(std**2)
    exactly(gaussian.log_evidence(A, std, y), MultivariateNormal(A @ gaussian.mean.flatten(), S).log_prob(y))
    exactly(gaussian.log_evidence(A, std, y)[1], gaussian.log_evidence(A, std, y[1]))
    exactly(gaussian.posterior(A, std, y[1]).mean, posterior.mean[1])


def test_a_process_conditioned_on_pixels(assert_mean):
    """Kriging by hand: the hidden pixels' mean and covariance from blocks of the kernel alone."""
    prior, problem = GaussianPrior.process(5, 2.0, steps=3, dtype=D), Inpainting((1, 5, 5), "box", 0.2)
    seen = problem.mask.flatten().numpy()
    K = prior.covariance.numpy()
    gain = K[np.ix_(~seen, seen)] @ np.linalg.inv(K[np.ix_(seen, seen)] + 0.04 * np.eye(seen.sum()))
    y = torch.randn((2, int(seen.sum())), generator=torch.Generator().manual_seed(0), dtype=D)
    posterior = prior.posterior(affine(problem)[0], 0.2, y)
    np.testing.assert_allclose(posterior.mean.flatten(1).numpy()[:, ~seen], y.numpy() @ gain.T, atol=1e-9)
    left = K[np.ix_(~seen, ~seen)] - gain @ K[np.ix_(seen, ~seen)]
    np.testing.assert_allclose(posterior.covariance.numpy()[np.ix_(~seen, ~seen)], left, atol=1e-9)


def paths(prior, posterior, y, generator, n=6):
    """Posterior, prior, backtracked and random paths, all of shape (K + 1, n, B, *shape)."""
    drawn, other = rollout(posterior, n, y, generator), rollout(prior, n, y, generator)
    yield "posterior", drawn
    yield "prior", other
    yield "backtracked posterior", Trajectory(renoise(prior, drawn.x_0, generator), prior.times, y)
    yield "backtracked prior", Trajectory(renoise(prior, other.x_0, generator), prior.times, y)
    yield "random", Trajectory(3 * torch.randn(drawn.x.shape, generator=generator, dtype=D), prior.times, y)


@torch.no_grad()
def residual(prior, chain, problem, log_evidence, path):
    """log Z + log q(tau | y) - log p(tau) - log p(y | x_0)."""
    likelihood = problem.log_likelihood(path.x_0, path.y)
    return log_evidence + path_log_prob(chain, path, chunk_size=7) - path_log_prob(prior, path) - likelihood


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rtb_residual_is_zero_on_every_path(shape, steps, schedule, make_prior, generator):
    """Of the exact chain, and of the steps of the guided posterior before any training (it starts from the prior's x_T, which some
    schedules leave with a trace of x_0); not of chains a little off."""
    prior = make_prior("gaussian", schedule, steps, shape=shape)
    A, y = observed(prior, generator)
    problem = InverseProblem(A, GaussianNoise(0.5))
    guided = Posterior(prior, problem, width=8)
    exact, log_evidence = prior.posterior(A, 0.5, y), prior.log_evidence(A, 0.5, y)
    spoilt = GaussianPrior(exact.mean, 1.02 * exact.covariance, shape, schedule, steps)
    elsewhere = prior.posterior(A, 0.5, y + 0.01)
    assert isinstance(guided.guide, GaussianGuidance) and guided.references is None
    for name, path in paths(prior, exact, y, generator):
        start = initial_log_prob(exact, path) - initial_log_prob(guided, path)
        for right, given in ((exact, 0.0), (guided, start)):
            zero = residual(prior, right, problem, log_evidence, path) + given
            assert zero.shape == (6, 3)
            assert float(zero.abs().max()) < 1e-8, name
        for wrong in (spoilt, elsewhere):
            assert float(residual(prior, wrong, problem, log_evidence, path).abs().max()) > 1e-3, name


def test_tempered_guidance_is_exact_too(make_prior, generator):
    """p(y | x)^beta of Gaussian noise is that of noise sigma / sqrt(beta)."""
    prior = make_prior("gaussian")
    A, y = observed(prior, generator)
    guided = Posterior(prior, InverseProblem(A, GaussianNoise(0.5)), beta=4.0, width=8)
    path = rollout(guided, 5, y, generator)
    exactly(path_log_prob(prior.posterior(A, 0.25, y), path), path.log_prob, atol=1e-8)


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_the_particles_of_the_guided_start_have_one_weight(beta, make_prior, generator):
    """The twist is p(y | x_t)^beta there: no step changes a weight, which is Z(y)."""
    prior = make_prior("gaussian")
    A, y = observed(prior, generator)
    posterior = Posterior(prior, InverseProblem(A, GaussianNoise(0.5 * beta**0.5)), beta=beta, width=8)
    start, later = (smc(posterior, y, 7, generator, threshold=t).log_w for t in (0.0, 1.0))
    exactly(start, later[:1].expand_as(start), atol=1e-8)
    if beta == 1:
        exactly(start, prior.log_evidence(A, 0.5, y).expand_as(start), atol=1e-8)


@pytest.mark.parametrize("noise_std", [1e-2, 1e-4])
def test_the_guided_start_is_exact_at_small_noise(noise_std, make_prior, generator):
    """Ten of 36 directions are seen, and left with far less of their variance than the others."""
    prior = make_prior("gaussian", shape=(1, 6, 6), steps=10)
    A = torch.randn((10, 36), generator=generator, dtype=D)
    problem = InverseProblem(A, GaussianNoise(noise_std))
    y = problem.simulate(prior.sample(2, generator), generator)
    draws = importance(Posterior(prior, problem, width=8), y, 16, generator)
    assert float(draws.ess.min()) > 15.9
    torch.testing.assert_close(draws.log_w.mean(0), prior.log_evidence(A, noise_std, y), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", ["box", "blur"])
def test_guided_start_on_a_process_is_exact_in_float32(kind, generator):
    prior = GaussianPrior.process(8, 2.0, steps=8)
    blur = torch.rand((64, 64), generator=generator) / 8
    problem = Inpainting((1, 8, 8), "box", 0.1) if kind == "box" else InverseProblem(blur, GaussianNoise(0.1))
    posterior = Posterior(prior, problem, width=16)
    y = problem.simulate(prior.sample(3, generator), generator)
    draws = importance(posterior, y, 32, generator)
    assert float(draws.ess.min()) > 31.9
    A = affine(problem)[0]
    torch.testing.assert_close(draws.log_z, prior.log_evidence(A, 0.1, y), atol=0.02, rtol=0)


# A process


@pytest.mark.parametrize("kernel, value", [("rbf", np.exp(-0.5 * 5 / 4)), ("matern", (1 + (15 / 4) ** 0.5) * np.exp(-((15 / 4) ** 0.5)))])
def test_process_has_its_kernel(kernel, value):
    """Between (0, 0) and (1, 2): distance sqrt(5), length scale 2."""
    prior = GaussianPrior.process((1, 3, 4), 2.0, kernel, variance=3.0, nugget=0.1)
    K = prior.covariance.reshape(3, 4, 3, 4)
    assert prior.shape == (1, 3, 4) and prior.mean.dtype == torch.float32
    assert float(K[0, 0, 1, 2]) == pytest.approx(3 * 0.9 * value)
    assert float(K[1, 1, 2, 3]) == pytest.approx(3 * 0.9 * value)
    torch.testing.assert_close(K.reshape(12, 12).diagonal(), torch.full((12,), 3.0, dtype=D))
    assert GaussianPrior.process(4).shape == (1, 4, 4) and GaussianPrior.process((7,)).shape == (7,)


# Training, folders


def test_fit_and_folders(tmp_path, generator):
    """A few steps of training; what is written is what is read, to the last bit."""
    prior = GaussianPrior.process(4, 1.5, "rbf", steps=3)
    posterior = Posterior(prior, Inpainting((1, 4, 4), "half", 0.3), width=8)
    fit(posterior, 4, progress=False, warm_start=0.5, observations=2, draws=2, states=8)
    y = posterior.problem.simulate(prior.sample(2, generator), generator)
    posterior.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(tmp_path)
    assert isinstance(loaded.prior, GaussianPrior) and loaded.prior.shape == (1, 4, 4)
    for name, value in prior.state_dict().items():
        assert torch.equal(value, loaded.prior.state_dict()[name]), name
    ours, theirs = (p.sample(y, 3, torch.Generator().manual_seed(1)).x for p in (posterior, loaded))
    assert ours.shape == (3, 2, 1, 4, 4) and torch.equal(ours, theirs)
    fresh = Posterior(prior, Inpainting((1, 4, 4), "half", 0.3), width=8)
    assert any(not torch.equal(p, q) for p, q in zip(posterior.trainable(), fresh.trainable(), strict=True))


# Arguments

EYE = torch.eye(4, dtype=D)


@pytest.mark.parametrize("change, message", [
    ({"covariance": torch.eye(3)}, r"covariance must have shape \(d, d\) = \(4, 4\)"),
    ({"covariance": EYE + torch.triu(torch.ones(4, 4), 1)}, "covariance must be symmetric"),
    ({"covariance": EYE - 2 * torch.diag(EYE[0])}, "covariance must be positive definite, got a smallest eigenvalue of -1"),
    ({"covariance": EYE * float("nan")}, "covariance must be finite"),
    ({"mean": torch.full((2, 2), float("inf"))}, "mean must be finite"),
    ({"shape": (1, 2, 2)}, r"mean must have shape \(\*batch, 1, 2, 2\), got \(2, 2\)"),
    ({"steps": 0}, "steps"),
])  # fmt: skip
def test_bad_gaussians_get_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        GaussianPrior(**{"mean": torch.zeros((2, 2), dtype=D), "covariance": EYE, **change})


@pytest.mark.parametrize("A, noise_std, y, message", [
    (torch.ones(2, 3), 0.1, torch.ones(2), "A must have shape"),
    (torch.ones(1, 4), 0.1, torch.ones(2), "A must have shape"),
    (torch.ones(4), 0.1, torch.ones(1), "A must have shape"),
    (torch.ones(1, 4), 0.0, torch.ones(1), "noise_std must be above 0"),
])  # fmt: skip
def test_bad_observations_get_one_clear_error(A, noise_std, y, message):
    prior = GaussianPrior(torch.zeros((2, 2), dtype=D), EYE)
    for call in (prior.posterior, prior.log_evidence):
        with pytest.raises(ValueError, match=message):
            call(A.double(), noise_std, y.double())


@pytest.mark.parametrize("options, message", [
    ({"kernel": "exp"}, "kernel must be one of matern, rbf, got 'exp'"),
    ({"length_scale": 0.0}, "length_scale must be a finite number above 0"),
    ({"variance": -1.0}, "variance must be a finite number above 0"),
    ({"nugget": 2.0}, "nugget must be in"),
    ({"shape": 0}, "shape must be an integer of at least 1"),
    ({"shape": (1, 0)}, "shape must be an integer of at least 1"),
])  # fmt: skip
def test_bad_processes_get_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        GaussianPrior.process(**{"shape": 4, **options})
