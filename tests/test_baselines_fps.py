"""FPS-SMC against closed forms of one Gaussian component: the noised observations, the proposal, and the filter's own model.

Statistical checks are z-scores, |z| < 4.5 in each of a few dozen (a correct method fails one once in 150,000 seeds)."""

from importlib import import_module

import pytest
import torch
from test_baselines import MATRIX, NOISE, D, Stretched, linear, mixture, z

from rtb_inverse import GaussianNoise, InverseProblem
from rtb_inverse.baselines import fps_smc
from rtb_inverse.baselines.fps_smc import LEAST_ALPHA, Observer, noised_observations
from rtb_inverse.distributions import GaussianStep


def bound(prior, problem):
    problem.bind(prior.shape)
    return Observer.of(prior, problem)


def test_observations_climb_by_the_forward_process(generator):
    """y_t - alpha_t y has variance sigma_t^2 A A^T, and is correlated from level to level as the forward process is."""
    prior, n = mixture(), 40_000
    matrix = torch.tensor([[1.0, -0.5], [0.3, 2.0]], dtype=D)
    y = torch.tensor([[0.7, -1.0]], dtype=D).expand(n, 2)
    observer = bound(prior, InverseProblem(matrix, GaussianNoise(NOISE)))
    ys = noised_observations(prior, observer, y, generator)
    assert len(ys) == prior.steps + 1 and torch.equal(ys[-1], y)
    alpha, sigma = prior.schedule.alpha_sigma(prior.times)
    noise = [y_t - a * y for y_t, a in zip(ys, alpha, strict=True)]
    for k, j in ((0, 0), (2, 2), (2, 4), (0, 5)):
        expected = alpha[k] / alpha[j] * sigma[j] ** 2 * matrix @ matrix.T
        for row in range(2):
            for column in range(2):
                assert abs(z(noise[k][:, row] * noise[j][:, column], float(expected[row, column]))) < 4.5


def test_an_offset_of_the_operator_is_not_noised(generator):
    prior = mixture()
    problem = InverseProblem(lambda x: x @ MATRIX.T.to(x.dtype) + 5, GaussianNoise(NOISE))
    ours = fps_smc(prior, problem, torch.full((2, 1), 5.7, dtype=D), 50, torch.Generator().manual_seed(0))
    theirs = fps_smc(prior, linear(), torch.full((2, 1), 0.7, dtype=D), 50, torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours.x, theirs.x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_the_proposal_is_the_exact_gaussian_posterior(m, generator):
    """Against the precision form, on a base of unequal variances; the weight is the marginal density of y_s, also when a law is given."""
    prior, n = mixture(), 40_000
    matrix = torch.randn((m, 2), generator=generator, dtype=D)
    observer = bound(prior, InverseProblem(matrix, GaussianNoise(NOISE)))
    t = prior.times[3]
    std = float(prior.schedule.alpha_sigma(t)[0]) * NOISE
    mean, scale = torch.tensor([0.3, -0.7], dtype=D), torch.tensor([0.5, 1.5], dtype=D)
    y_s = torch.randn((1, m), generator=generator, dtype=D)
    base = GaussianStep(mean.expand(n, 1, 2), scale, 1)
    law = GaussianStep(mean.expand(n, 1, 2) + 0.2, 0.8 * scale, 1)
    x, log_w = observer.propose(base, base, y_s, t, generator)

    covariance = (torch.diag(scale**-2) + matrix.T @ matrix / std**2).inverse()
    expected = covariance @ (mean / scale**2 + matrix.T @ y_s[0] / std**2)
    for i in range(2):
        assert abs(z(x[:, 0, i], float(expected[i]))) < 4.5
        for j in range(i + 1):
            assert abs(z((x[:, 0, i] - expected[i]) * (x[:, 0, j] - expected[j]), float(covariance[i, j]))) < 4.5
    S = matrix @ torch.diag(scale**2) @ matrix.T + std**2 * torch.eye(m, dtype=D)
    evidence = torch.distributions.MultivariateNormal(matrix @ mean, S).log_prob(y_s[0])
    torch.testing.assert_close(log_w, evidence.expand(n, 1))

    x, log_w = observer.propose(base, law, y_s, t, generator)
    direct = law.log_prob(x) + GaussianStep(x @ matrix.T, torch.full((m,), std, dtype=D), 1).log_prob(y_s)
    posterior = torch.distributions.MultivariateNormal(expected, covariance)
    torch.testing.assert_close(log_w, direct - posterior.log_prob(x))


def filter_truth(prior, ys: torch.Tensor):
    """Of the filter's model, x_K .. x_0 of the forward process and y_k = A x_k + c_k sigma n_k with independent n_k, in closed form
    for one Gaussian component: log p(ys), and the mean (runs, 2) and covariance of x_0 given ys (runs, K + 1)."""
    alpha, sigma = prior.schedule.alpha_sigma(prior.times)
    C, m = prior.covariances[0], prior.means[0]
    K = len(alpha)
    joint = torch.zeros((2 * K, 2 * K), dtype=D)  # of x_K .. x_0
    for i in range(K):
        for j in range(i, K):  # j is the cleaner one
            block = alpha[i] / alpha[j] * (alpha[j] ** 2 * C + sigma[j] ** 2 * torch.eye(2, dtype=D))
            joint[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = block
            joint[2 * j : 2 * j + 2, 2 * i : 2 * i + 2] = block.T
    see = torch.block_diag(*[MATRIX] * K)
    S = see @ joint @ see.T + torch.diag((alpha.clamp_min(LEAST_ALPHA) * NOISE) ** 2)
    residual = ys - alpha * (MATRIX @ m)
    gain = torch.linalg.solve(S, see @ joint[:, -2:]).T
    log_p = torch.distributions.MultivariateNormal(torch.zeros(K, dtype=D), S).log_prob(residual)
    return log_p, m + residual @ gain.T, joint[-2:, -2:] - gain @ see @ joint[:, -2:]


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_its_evidence_is_that_of_the_filters_model(threshold):
    """Without bias: over 2,000 runs with 100 particles, each run with noised observations of its own."""
    prior, y = mixture(), torch.full((2000, 1), 0.7, dtype=D)
    ys = noised_observations(prior, bound(prior, linear()), y, torch.Generator().manual_seed(0))
    log_p, _, _ = filter_truth(prior, torch.cat(ys, -1))
    log_z = fps_smc(prior, linear(), y, 100, torch.Generator().manual_seed(0), threshold=threshold).log_z
    assert abs(z((log_z - log_p).exp(), 1.0)) < 4.5
    assert float((log_z - log_p).std()) < 0.5


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_its_particles_are_those_of_the_filters_model(threshold):
    """Of 100 runs with 2,000 particles: the bias, of the order of 1 / 2,000, is far below the error of the mean."""
    prior, y = mixture(), torch.full((100, 1), 0.7, dtype=D)
    ys = noised_observations(prior, bound(prior, linear()), y, torch.Generator().manual_seed(2))
    _, mean, covariance = filter_truth(prior, torch.cat(ys, -1))
    particles = fps_smc(prior, linear(), y, 2000, torch.Generator().manual_seed(2), threshold=threshold)
    for j in range(2):
        assert abs(z(particles.mean[:, j] - mean[:, j], 0.0)) < 4.5
        assert abs(z(second_moment(particles, mean)[:, j], float(covariance[j, j]))) < 4.5


def second_moment(particles, centre) -> torch.Tensor:
    """(B, d)."""
    return torch.einsum("nb,nbd->bd", particles.weights, (particles.x - centre) ** 2)


def test_the_filters_model_is_too_sure_at_a_finite_noise_the_more_so_the_more_steps():
    """In closed form, the variance of A x_0 over that of the posterior, as the module says."""
    shares = []
    for steps in (6, 40):
        prior = mixture(steps=steps)
        _, _, covariance = filter_truth(prior, torch.zeros((1, steps + 1), dtype=D))
        exact = prior.posterior(MATRIX, NOISE, torch.zeros(1, dtype=D)).covariances[0]
        shares.append(float(MATRIX @ covariance @ MATRIX.T) / float(MATRIX @ exact @ MATRIX.T))
    assert 0.5 < shares[0] < 0.6 and shares[1] < 0.25


def test_it_finds_the_posterior_at_no_noise():
    prior, y = mixture(), torch.full((100, 1), 0.7, dtype=D)
    exact = prior.posterior(MATRIX, 1e-4, y[:1]).distribution
    particles = fps_smc(prior, linear(1e-4), y, 1000, torch.Generator().manual_seed(0))
    for j in range(2):
        assert abs(z(particles.mean[:, j], float(exact.mean[0, j]))) < 4.5
        assert abs(z(second_moment(particles, exact.mean)[:, j], float(exact.variance[0, j]))) < 4.5


def test_fps_refuses_a_decoder_and_a_huge_matrix(monkeypatch):
    with pytest.raises(ValueError, match="prior must live in data space for fps_smc"):
        fps_smc(Stretched(), linear(), torch.ones((1, 1), dtype=D))
    monkeypatch.setattr(import_module("rtb_inverse.baselines.fps_smc"), "DENSE_LIMIT", 1)
    with pytest.raises(ValueError, match="the operator's matrix must have at most 1 elements for fps_smc, got 2"):
        fps_smc(mixture(), linear(), torch.ones((1, 1), dtype=D))
