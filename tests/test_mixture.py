"""The mixture prior against torch's MixtureSameFamily, Bayes' rule pointwise, autograd and quadrature; and test number one:
the RTB residual of the exact posterior chain is zero on every path."""

import itertools

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from priors import GaussianMixturePrior
from rtb_inverse.chains import Trajectory, path_log_prob, renoise, rollout
from rtb_inverse.problems import GaussianNoise, InverseProblem
from rtb_inverse.schedules import VariancePreserving

M = 20_000


def truth(prior, t):
    """p(x_t) by torch, from the covariance matrices themselves."""
    alpha, sigma = prior.schedule.alpha_sigma(t)
    d = prior.shape[0]
    covariance = alpha**2 * prior.covariances + sigma**2 * torch.eye(d, dtype=torch.float64)
    return MixtureSameFamily(Categorical(logits=prior.log_weights), MultivariateNormal(alpha * prior.means, covariance))


def exactly(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-11)


@pytest.fixture(params=[1, 2, 5])
def mixture(request, schedule, make_prior):
    return make_prior("mixture", schedule, steps=6, d=request.param)


@pytest.fixture
def observation(generator):
    """observation(d, m, B): a random matrix and B observations."""

    def make(d, m=2, b=3):
        A = torch.randn((m, d), generator=generator, dtype=torch.float64)
        return A, 3 * torch.randn((b, m), generator=generator, dtype=torch.float64)

    return make


def test_distribution_is_torchs_mixture(mixture, generator, assert_mean):
    dist, theirs = mixture.distribution, truth(mixture, torch.tensor(-1.0))
    x = dist.sample((M,), generator)
    exactly(dist.log_prob(x[:100]), theirs.log_prob(x[:100]))
    exactly(dist.mean, theirs.mean)
    exactly(dist.variance, theirs.variance)
    assert_mean(x, theirs.mean)
    second = mixture.covariances + mixture.means[:, :, None] * mixture.means[:, None, :]
    assert_mean(x[:, :, None] * x[:, None, :], torch.einsum("j,jde->de", mixture.log_weights.exp(), second))


def test_initial_is_the_marginal(mixture, generator):
    x = 5 * torch.randn((4, 2, *mixture.shape), generator=generator, dtype=torch.float64)
    dist = mixture.initial((4, 2))
    assert dist.batch_shape == (4, 2)
    exactly(dist.log_prob(x), truth(mixture, mixture.times[0]).log_prob(x))


def test_transitions_are_bayes_rule_pointwise(mixture, generator):
    """p(x_s) q(x_t | x_s) = p(x_t) p(x_s | x_t), wherever, between neighbours and across the whole grid."""
    times = mixture.times
    for t, s in [*itertools.pairwise(times), (times[0], times[-1]), (times[1], times[4])]:
        alpha_s, sigma_s = mixture.schedule.alpha_sigma(s)
        a, b = mixture.schedule.forward_step(s, t)
        x_s = alpha_s * mixture.distribution.sample((5, 4), generator)
        x_s = x_s + (sigma_s + 0.3) * torch.randn(x_s.shape, generator=generator, dtype=torch.float64)
        x_t = a * x_s + 1.5 * b * torch.randn(x_s.shape, generator=generator, dtype=torch.float64)
        forward = MultivariateNormal(a * x_s, b**2 * torch.eye(mixture.shape[0], dtype=torch.float64))
        left = truth(mixture, s).log_prob(x_s) + forward.log_prob(x_t)
        right = truth(mixture, t).log_prob(x_t) + mixture.transition(x_t, t, s).log_prob(x_s)
        exactly(left, right, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_chain_draws_the_mixture_at_any_number_of_steps(steps, schedule, make_prior, generator, assert_mean):
    prior = make_prior("mixture", schedule, steps=steps)
    trajectory = rollout(prior, M, generator=generator)
    for x_t, t in zip(trajectory.x[:, :, 0], trajectory.times, strict=True):
        marginal = truth(prior, t)
        assert_mean(x_t, marginal.mean)
        assert_mean((x_t - marginal.mean) ** 2, marginal.variance)
        if float(prior.schedule.alpha_sigma(t)[0]) < 1e-3:
            continue  # x_t knows nothing of its component
        components = marginal.component_distribution.log_prob(x_t[:, None]) + marginal.mixture_distribution.logits
        assert_mean(components.softmax(-1), prior.log_weights.exp())  # E p(j | x_t) = w_j


def test_sample_is_exact_draws(mixture_prior, assert_mean):
    x = mixture_prior.sample(M, torch.Generator().manual_seed(3))
    assert x.shape == (M, 3)
    assert_mean(x, mixture_prior.distribution.mean)
    assert torch.equal(x, mixture_prior.sample(M, torch.Generator().manual_seed(3)))


def test_batched_transitions_are_single_ones(mixture, generator):
    """Times (R, 1) against states (R, B, d), as scoring in chunks calls it."""
    x = 3 * torch.randn((4, 3, *mixture.shape), generator=generator, dtype=torch.float64)
    t, s = mixture.times[:4, None], mixture.times[1:5, None]
    batched = mixture.transition(x, t, s)
    z = batched.sample(generator=generator)
    assert batched.batch_shape == (4, 3) and batched.event_shape == mixture.shape
    for r in range(4):
        for b in range(3):
            single = mixture.transition(x[r, b], t[r, 0], s[r, 0])
            exactly(batched.log_prob(z)[r, b], single.log_prob(z[r, b]))
            exactly(batched.mean[r, b], single.mean)
            exactly(batched.variance[r, b], single.variance)


def test_denoise_is_tweedies_formula(mixture, generator):
    """E[x_0 | x_t] = (x_t + sigma^2 grad log p(x_t)) / alpha, the score by autograd."""
    for t in mixture.times[1:-1]:
        alpha, sigma = mixture.schedule.alpha_sigma(t)
        x_t = (alpha * mixture.distribution.sample((20,), generator)).requires_grad_()
        (score,) = torch.autograd.grad(truth(mixture, t).log_prob(x_t).sum(), x_t)
        exactly(mixture.denoise(x_t.detach(), t), (x_t.detach() + sigma**2 * score) / alpha, atol=1e-8)


def test_denoiser_error_is_the_mean_posterior_variance(mixture_prior, generator, assert_mean):
    """E (x_0 - E[x_0 | x_t])^2 = E var(x_0 | x_t), within the error of the 4,096 draws it was measured on."""
    prior = mixture_prior
    for t in prior.times[:-1]:
        x_0 = prior.distribution.sample((M,), generator)
        x_t = prior.schedule.add_noise(x_0, torch.randn(x_0.shape, generator=generator, dtype=torch.float64), t)
        error = prior.denoiser_error(t)
        assert error.shape == prior.shape
        samples = (x_0 - prior.denoise(x_t, t)).square()
        spread = samples.std(0) * (1 / M + 1 / 4096) ** 0.5
        assert float(((samples.mean(0) - error) / spread).abs().max()) < 4.5
        torch.testing.assert_close(prior.denoiser_covariance(t).diagonal(), error)
        conditional = prior.transition(x_t, t, prior.times[-1]).variance
        assert_mean(samples - conditional, 0.0)


# The exact posterior


@pytest.fixture
def plane(make_prior):
    """A 2-D mixture, a grid over the plane, and the weight of its cells."""
    prior = make_prior("mixture", d=2)
    axis = torch.linspace(-16, 16, 801, dtype=torch.float64)
    return prior, torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


@pytest.mark.parametrize("noise_std", [0.4, torch.tensor([0.3, 1.0], dtype=torch.float64)])
@pytest.mark.parametrize("m", [1, 2])
def test_posterior_and_evidence_are_those_of_quadrature(m, noise_std, plane, observation):
    if m == 1 and isinstance(noise_std, torch.Tensor):
        noise_std = noise_std[:1]
    prior, grid, cell = plane
    A, y = observation(2, m)
    evidence, posterior = prior.log_evidence(A, noise_std, y), prior.posterior(A, noise_std, y)
    noise = torch.distributions.Normal(grid @ A.T, noise_std)
    for b in range(len(y)):
        log_joint = prior.distribution.log_prob(grid) + noise.log_prob(y[b]).sum(-1)
        log_z = (log_joint.exp().sum() * cell).log()
        torch.testing.assert_close(evidence[b], log_z, atol=1e-5, rtol=1e-5)
        density = (log_joint - log_z).exp()
        mean = (density[:, None] * grid).sum(0) * cell
        torch.testing.assert_close(posterior.distribution.mean[b], mean, atol=1e-4, rtol=1e-4)
        variance = (density[:, None] * (grid - mean) ** 2).sum(0) * cell
        torch.testing.assert_close(posterior.distribution.variance[b], variance, atol=1e-4, rtol=1e-4)
        single = prior.posterior(A, noise_std, y[b])
        torch.testing.assert_close(single.distribution.log_prob(grid[::97]), log_joint[::97] - log_z, atol=1e-4, rtol=1e-6)


@pytest.mark.parametrize("m", [1, 2, 6])
@pytest.mark.parametrize("noise_std", [0.01, 0.5])
def test_posterior_is_bayes_rule_pointwise(m, noise_std, mixture, observation, generator):
    """log p(x | y) + log p(y) = log p(x) + log p(y | x), in any dimension."""
    d = mixture.shape[0]
    A, _ = observation(d, m)
    x = mixture.distribution.sample((7,), generator)
    y = x @ A.T + noise_std * torch.randn((7, m), generator=generator, dtype=torch.float64)
    posterior = mixture.posterior(A, noise_std, y)
    likelihood = torch.distributions.Normal(x @ A.T, noise_std).log_prob(y).sum(-1)
    left = posterior.distribution.log_prob(x) + mixture.log_evidence(A, noise_std, y)
    torch.testing.assert_close(left, mixture.distribution.log_prob(x) + likelihood, atol=1e-6, rtol=1e-8)


def test_batched_posterior_is_single_ones(mixture, observation, generator):
    d = mixture.shape[0]
    A, y = observation(d, 2, 4)
    batched = mixture.posterior(A, 0.3, y)
    x = 3 * torch.randn((5, 4, d), generator=generator, dtype=torch.float64)
    t, s = mixture.times[2], mixture.times[3]
    for b in range(4):
        single = mixture.posterior(A, 0.3, y[b])
        exactly(mixture.log_evidence(A, 0.3, y)[b], mixture.log_evidence(A, 0.3, y[b]))
        exactly(batched.distribution.log_prob(x)[:, b], single.distribution.log_prob(x[:, b]), atol=1e-8)
        exactly(batched.transition(x, t, s).log_prob(x)[:, b], single.transition(x[:, b], t, s).log_prob(x[:, b]), atol=1e-8)
        exactly(batched.initial((5, 4)).log_prob(x)[:, b], single.initial((5,)).log_prob(x[:, b]), atol=1e-8)
    draws = batched.distribution.sample((M,), generator)
    assert draws.shape == (M, 4, d)


def test_batched_posterior_draws_each_its_own(mixture, observation, generator, assert_mean):
    A, y = observation(mixture.shape[0], 2, 3)
    posterior = mixture.posterior(A, 0.5, y)
    x = rollout(posterior, M, y, generator).x_0
    assert_mean(x, posterior.distribution.mean)
    assert_mean((x - posterior.distribution.mean) ** 2, posterior.distribution.variance)


# Test number one


def paths(prior, posterior, y, generator, n=8):
    """Posterior, prior, backtracked and random paths, all of shape (K + 1, n, B, d)."""
    drawn, other = rollout(posterior, n, y, generator), rollout(prior, n, y, generator)
    yield "posterior", drawn
    yield "prior", other
    yield "backtracked posterior", Trajectory(renoise(prior, drawn.x_0, generator), prior.times, y)
    yield "backtracked prior", Trajectory(renoise(prior, other.x_0, generator), prior.times, y)
    yield "random", Trajectory(5 * torch.randn(drawn.x.shape, generator=generator, dtype=torch.float64), prior.times, y)


def residual(prior, chain, problem, log_evidence, path):
    """log Z + log q(tau | y) - log p(tau) - log p(y | x_0)."""
    likelihood = problem.log_likelihood(path.x_0, path.y)
    return log_evidence + path_log_prob(chain, path, chunk_size=7) - path_log_prob(prior, path) - likelihood


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("d", [2, 5])
def test_rtb_residual_of_the_exact_posterior_is_zero_on_every_path(d, steps, schedule, make_prior, observation, generator):
    prior = make_prior("mixture", schedule, steps, d=d)
    A, y = observation(d)
    problem = InverseProblem(A, GaussianNoise(0.5), (d,))
    exact, log_evidence = prior.posterior(A, 0.5, y), prior.log_evidence(A, 0.5, y)
    spoilt = GaussianMixturePrior(exact.log_weights.exp(), exact.means, 1.02 * exact.covariances, schedule, steps)
    elsewhere = prior.posterior(A, 0.5, y + 0.01)
    for name, path in paths(prior, exact, y, generator):
        zero = residual(prior, exact, problem, log_evidence, path)
        assert zero.shape == (8, 3)
        assert float(zero.abs().max()) < 1e-8, name
        for wrong in (spoilt, elsewhere):
            assert float(residual(prior, wrong, problem, log_evidence, path).abs().max()) > 1e-3, name


# Arguments


def arguments(**change):
    eye = torch.eye(2, dtype=torch.float64).repeat(3, 1, 1)
    return {"weights": torch.ones(3, dtype=torch.float64), "means": torch.zeros(3, 2, dtype=torch.float64), "covariances": eye} | change


@pytest.mark.parametrize("change, message", [
    ({"weights": torch.ones(4)}, "weights must have shape"),
    ({"weights": torch.tensor([1.0, 0.0, 1.0])}, "weights must be finite and above 0"),
    ({"weights": torch.tensor([1.0, float("nan"), 1.0])}, "weights must be finite and above 0"),
    ({"means": torch.zeros(3)}, "weights must have shape"),
    ({"covariances": torch.eye(2)}, "covariances must have shape"),
    ({"covariances": -torch.eye(2).repeat(3, 1, 1)}, "positive definite"),
    ({"steps": 0}, "steps"),
])  # fmt: skip
def test_bad_mixtures_get_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixturePrior(**arguments(**change))


@pytest.mark.parametrize("A, noise_std, y, message", [
    (torch.ones(2, 3), 0.1, torch.ones(2), "A must have shape"),
    (torch.ones(1, 2), 0.1, torch.ones(2), "A must have shape"),
    (torch.ones(1, 2), 0.0, torch.ones(1), "noise_std must be above 0"),
])  # fmt: skip
def test_bad_observations_get_one_clear_error(A, noise_std, y, message):
    prior = GaussianMixturePrior(**arguments())
    for call in (prior.posterior, prior.log_evidence):
        with pytest.raises(ValueError, match=message):
            call(A.double(), noise_std, y.double())


def test_weights_are_normalised_and_random_is_seeded():
    prior = GaussianMixturePrior(**arguments(weights=torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)))
    exactly(prior.log_weights.exp(), torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64))
    assert isinstance(prior.schedule, VariancePreserving)
    first, again, other = (GaussianMixturePrior.random(3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.means, again.means) and not torch.equal(first.means, other.means)
