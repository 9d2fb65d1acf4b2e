"""Corrections against exact posteriors: of mixtures, and of Gaussian chains that are not the exact reversal.

Statistical checks are z-scores, |z| < 4.5 in each of a few (a correct method fails one once in 150,000 seeds)."""

import pytest
import torch
from conftest import Coarse

from priors import GaussianMixturePrior
from rtb_inverse import GaussianNoise, InverseProblem, Posterior, Reward, corrections, importance, refine, renoise_mcmc, rollout, smc
from rtb_inverse.diagnostics import pareto_smooth

D = torch.float64
MATRIX, NOISE = torch.tensor([[1.0, -0.5]], dtype=D), 0.5


def mixture_posterior(start: str = "guided") -> Posterior:
    """Untrained, but off the start: no ratio is one by chance."""
    prior = GaussianMixturePrior.random(2, 4, 0, D, steps=6)
    posterior = Posterior(prior, InverseProblem(MATRIX, GaussianNoise(NOISE)), start, width=16)
    with torch.no_grad():
        posterior.log_scale += 0.2
    return posterior


def marginal(prior: Coarse) -> tuple[float, float]:
    """Mean and variance of the chain's own x_0, from its affine steps."""
    zero, one = torch.zeros((1, 2), dtype=D), torch.ones((1, 2), dtype=D)
    start = prior.initial((1,))
    mean, variance = float(start.mean[0, 0]), float(start.variance[0, 0])
    for t, s in zip(prior.times[:-1], prior.times[1:], strict=True):
        offset = float(prior.transition(zero, t, s).mean[0, 0])
        step = prior.transition(one, t, s)
        slope = float(step.mean[0, 0]) - offset
        mean, variance = offset + slope * mean, slope**2 * variance + float(step.variance[0, 0])
    return mean, variance


def z(samples, truth) -> float:
    return float((samples.mean() - truth) / samples.std() * samples.numel() ** 0.5)


def coarse_truth(prior: Coarse, y: float) -> tuple[float, float]:
    """Posterior mean and variance of each element of x for y = x + noise."""
    mean, variance = marginal(prior)
    gain = variance / (variance + NOISE**2)
    return mean + gain * (y - mean), variance * (1 - gain)


def coarse_posterior() -> Posterior:
    """Unguided: its tails are as wide as the posterior's, so no chain sticks."""
    posterior = Posterior(Coarse(2), InverseProblem(torch.nn.Identity(), GaussianNoise(NOISE)), "prior", width=16)
    with torch.no_grad():
        posterior.log_scale += 0.1
    return posterior


# Re-noising MCMC


@pytest.mark.parametrize("candidates", [1, 3])
def test_chains_that_start_at_exact_draws_stay_exact(candidates, generator, monkeypatch):
    posterior, n = mixture_posterior(), 4000
    y = torch.tensor([[0.7]], dtype=D)
    exact = posterior.prior.posterior(MATRIX, NOISE, y)
    start = exact.distribution.sample((n,), generator)
    reference = exact.distribution.sample((200_000,), generator)[:, 0]

    def worst():
        x = renoise_mcmc(posterior, y, n, generator, sweeps=6, candidates=candidates, start=start, chunk_size=None).x[:, 0]
        moved = float((x != start[:, 0]).any(1).double().mean())
        statistics = (lambda v: v[:, 0], lambda v: v[:, 1], lambda v: v[:, 0] ** 2, lambda v: v[:, 1] ** 2, lambda v: v[:, 0] * v[:, 1])
        return max(abs(z(f(x), float(f(reference).mean()))) for f in statistics), moved

    value, moved = worst()
    assert value < 4.5 and moved > 0.5
    monkeypatch.setattr(Posterior, "log_likelihood", lambda self, x_0, y: x_0.new_zeros(x_0.shape[:2]))
    assert worst()[0] > 8  # another target


def test_chains_find_the_posterior_of_a_chain_that_is_not_the_exact_reversal(generator):
    """From prior draws, with all three moves at work."""
    posterior, n = coarse_posterior(), 3000
    y = torch.tensor([[1.7, 1.7]], dtype=D)
    start = rollout(posterior.prior, n, y, generator).x_0
    x = renoise_mcmc(posterior, y, n, generator, sweeps=60, start=start).x[:, 0]
    mean, variance = coarse_truth(posterior.prior, 1.7)
    for j in range(2):
        assert abs(z(x[:, j], mean)) < 4.5 and abs(z((x[:, j] - mean) ** 2, variance)) < 4.5


def test_forward_moves_are_always_accepted_on_an_exact_reversal(generator):
    posterior = mixture_posterior()
    y = torch.tensor([[0.7], [-2.0]], dtype=D)
    states = rollout(posterior, 5, y, generator).x
    for level in range(1, posterior.steps + 1):
        for move in (corrections.climb, corrections.bridge):
            proposal, log_ratio = move(posterior, states, level, y, generator, 7)
            assert proposal.shape == states.shape and torch.equal(proposal[-1], states[-1])
            assert float(log_ratio().abs().max()) < 1e-8
            kept = posterior.steps - level
            assert torch.equal(proposal[kept], states[kept])


def test_what_the_chains_say_of_themselves(generator):
    """A posterior whose steps are three times too wide is accepted rarely from the top: burn-in lowers the level, and finds more moves."""
    posterior, y = mixture_posterior(), torch.full((2, 1), 0.7, dtype=D)
    info = renoise_mcmc(posterior, y, 300, generator, sweeps=60).info
    assert info["evaluations"] >= 4 * posterior.steps + 60 * 2 and info["level"] == posterior.steps
    assert all(info[name].shape == (2,) for name in ("acceptance", "r_hat", "effective_draws"))
    assert bool((info["r_hat"] < 1.1).all()) and bool((info["effective_draws"] > 300).all()) and bool((info["acceptance"] > 0.3).all())
    with torch.no_grad():
        posterior.log_scale += 1.2
    plain, adapted = (renoise_mcmc(posterior, y, 300, generator, sweeps=12, burn_in=burn_in).info for burn_in in (0, 20))
    assert adapted["level"] < posterior.steps and bool((adapted["acceptance"] > plain["acceptance"]).all())


def test_refined_populations_come_closer(generator):
    """Means of the draws: off at first, by many standard errors; after refinement within 4.5 of them."""
    posterior, y, n = mixture_posterior(), torch.tensor([[0.7]], dtype=D), 4000
    with torch.no_grad():
        posterior.gate.fill_(0.6)
    truth = posterior.prior.posterior(MATRIX, NOISE, y).distribution.mean[0]
    raw, refined = posterior.sample(y, n, generator).x[:, 0], refine(posterior, y, n, generator, rounds=8).x[:, 0]
    assert max(abs(z(raw[:, j], float(truth[j]))) for j in range(2)) > 9
    assert max(abs(z(refined[:, j], float(truth[j]))) for j in range(2)) < 4.5


def test_smoothed_importance(generator):
    posterior, y = mixture_posterior(), torch.tensor([[0.7], [2.0]], dtype=D)
    plain, smooth = (importance(posterior, y, 200, torch.Generator().manual_seed(1), smooth=s) for s in (False, True))
    assert torch.equal(plain.x, smooth.x) and torch.equal(plain.info["k_hat"], smooth.info["k_hat"])
    assert torch.equal(smooth.log_w, pareto_smooth(plain.log_w)[0]) and not torch.equal(smooth.log_w, plain.log_w)
    assert smooth.info["k_hat"].shape == (2,) and bool((smooth.info["k_hat"] < 0.7).all())


def test_default_start_and_reward(generator):
    prior = GaussianMixturePrior.random(2, 4, 0, D, steps=4)
    reward = Posterior(prior, Reward(lambda x: -x.square().sum(-1)), width=16)
    draws = renoise_mcmc(reward, None, 6, generator, sweeps=2)
    assert draws.x.shape == (6, 1, 2) and torch.equal(draws.log_w, torch.zeros((6, 1), dtype=D))
    one, two = (renoise_mcmc(mixture_posterior(), torch.ones((3, 1), dtype=D), 4, torch.Generator().manual_seed(1)).x for _ in range(2))
    assert one.shape == (4, 3, 2) and torch.equal(one, two)


# Sequential Monte Carlo


@pytest.mark.parametrize("start", ["guided", "prior"])
@pytest.mark.parametrize("twist", ["likelihood", "none"])
def test_evidence_is_unbiased(start, twist, generator):
    """Z-hat / Z averages to one over 3,000 runs with 16 particles, that resample."""
    posterior, runs = mixture_posterior(start), 3000
    y = torch.full((runs, 1), 0.7, dtype=D)
    truth = posterior.prior.log_evidence(MATRIX, NOISE, y[0])
    ratio = (smc(posterior, y, 16, generator, twist=twist, threshold=0.9).log_z - truth).exp()
    assert abs(z(ratio, 1.0)) < 4.5


def test_particles_are_of_the_posterior(generator):
    posterior, n, b = mixture_posterior("prior"), 500, 40
    y = torch.full((b, 1), 0.7, dtype=D)
    exact = posterior.prior.posterior(MATRIX, NOISE, y[:1]).distribution
    means = smc(posterior, y, n, generator).mean  # (b, 2), biased by 1 / n
    assert all(abs(z(means[:, j], float(exact.mean[0, j]))) < 4.5 for j in range(2))


def test_without_resampling_it_is_importance_sampling():
    posterior, y = mixture_posterior(), torch.tensor([[0.7], [2.0]], dtype=D)
    runs = [torch.Generator().manual_seed(3) for _ in range(3)]
    plain = importance(posterior, y, 9, runs[0])
    for twist, run in zip(("none", "likelihood"), runs[1:], strict=True):
        particles = smc(posterior, y, 9, run, twist=twist, threshold=0.0)
        torch.testing.assert_close(particles.x, plain.x)
        torch.testing.assert_close(particles.log_w, plain.log_w)


def test_networks_and_rewards_run(make_prior, generator):
    prior = make_prior("unet2d")
    posterior = Posterior(prior, InverseProblem(torch.nn.Flatten(), GaussianNoise(0.5)))
    y = torch.zeros((2, posterior.shape.numel()))
    assert torch.isfinite(smc(posterior, y, 3, generator).log_w).all()
    assert torch.isfinite(renoise_mcmc(posterior, y, 3, generator, sweeps=1).x).all()
    reward = Posterior(GaussianMixturePrior.random(2, 4, 0, D, steps=4), Reward(lambda x: -x.square().sum(-1)), width=16)
    assert smc(reward, None, 5, generator).x.shape == (5, 1, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, y: smc(p, y, 1), "n must be an integer of at least 2"),
        (lambda p, y: smc(p, y, twist="gradient"), "twist must be one of"),
        (lambda p, y: smc(p, y, threshold=1.5), r"threshold must be in \[0, 1\], got 1.5"),
        (lambda p, y: smc(p, y[:, :0]), "y must have shape"),
        (lambda p, y: renoise_mcmc(p, y, 0), "n must be an integer of at least 1"),
        (lambda p, y: renoise_mcmc(p, y, 4, sweeps=0), "sweeps must be an integer of at least 1"),
        (lambda p, y: renoise_mcmc(p, y, 4, burn_in=-1), "burn_in must be an integer of at least 0"),
        (lambda p, y: renoise_mcmc(p, y, 4, candidates=0), "candidates must be an integer of at least 1"),
        (lambda p, y: refine(p, y, 4, candidates=1), "candidates must be an integer of at least 2"),
        (lambda p, y: renoise_mcmc(p, y, 4, start=torch.zeros(3, 1, 2)), r"start must have shape .*\(4, 1, 2\), got \(3, 1, 2\)"),
    ],
)
def test_bad_arguments_get_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call(mixture_posterior(), torch.ones((1, 1), dtype=D))
