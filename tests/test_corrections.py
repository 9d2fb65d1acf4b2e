"""Corrections against exact posteriors: of mixtures, and of Gaussian chains that are not the exact reversal.

Statistical checks are z-scores, |z| < 4.5 in each of a few (a correct method fails one once in 150,000 seeds)."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from conftest import MATRIX, NOISE, Coarse, marginal, mixture_posterior, z

from priors import GaussianMixturePrior
from rtb_inverse import GaussianNoise, InverseProblem, Posterior, Reward, corrections, importance, refine, renoise_mcmc, rollout, smc
from rtb_inverse.diagnostics import pareto_smooth

D = torch.float64


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


@pytest.mark.parametrize(("candidates", "burn_in"), [(1, 0), (3, 0), (1, 4), (3, 4)])
def test_chains_that_start_at_exact_draws_stay_exact(candidates, burn_in, generator, monkeypatch):
    posterior, n = mixture_posterior(), 1500 if burn_in else 4000
    y = torch.tensor([[0.7]], dtype=D)
    exact = posterior.prior.posterior(MATRIX, NOISE, y)
    start = exact.distribution.sample((n,), generator)
    reference = exact.distribution.sample((200_000,), generator)[:, 0]

    def worst():
        x = renoise_mcmc(posterior, y, n, generator, sweeps=6, burn_in=burn_in, candidates=candidates, start=start, chunk_size=None).x[:, 0]
        moved = float((x != start[:, 0]).any(1).double().mean())
        statistics = (lambda v: v[:, 0], lambda v: v[:, 1], lambda v: v[:, 0] ** 2, lambda v: v[:, 1] ** 2, lambda v: v[:, 0] * v[:, 1])
        return max(abs(z(f(x), float(f(reference).mean()))) for f in statistics), moved

    value, moved = worst()
    assert value < 4.5 and moved > 0.5
    monkeypatch.setattr(Posterior, "log_likelihood", lambda self, x_0, y: x_0.new_zeros(x_0.shape[:2]))
    assert burn_in or worst()[0] > 8  # another target


def exact_coarse_paths(posterior: Posterior, y: torch.Tensor, n: int, generator) -> torch.Tensor:
    """Paths of the chain's own posterior: all is Gaussian, so those of the prior move with what y adds (Matheron's rule)."""
    prior = posterior.prior
    paths = rollout(prior, n, y, generator).x
    zero, one = torch.zeros((1, 2), dtype=D), torch.ones((1, 2), dtype=D)
    slopes, variances = [], [float(prior.initial((1,)).variance[0, 0])]
    for t, s in pairwise(prior.times):
        slopes.append(float((prior.transition(one, t, s).mean - prior.transition(zero, t, s).mean)[0, 0]))
        variances.append(slopes[-1] ** 2 * variances[-1] + float(prior.transition(one, t, s).variance[0, 0]))
    covariance = [variances[k] * float(torch.tensor(slopes[k:]).prod()) for k in range(len(variances))]  # of x_k and x_0
    gain = torch.tensor(covariance, dtype=D) / (variances[-1] + NOISE**2)
    return paths + gain[:, None, None, None] * (y - posterior.problem.simulate(paths[-1], generator))


@pytest.mark.parametrize("candidates", [1, 3])
def test_exact_paths_of_a_chain_that_is_not_the_exact_reversal_stay_exact(candidates, generator):
    """Mean and variance of both elements at three levels, at the start and after 12 sweeps."""
    posterior, y = coarse_posterior(), torch.tensor([[1.7, 1.7]], dtype=D)
    before = exact_coarse_paths(posterior, y, 4000, generator)
    truth = exact_coarse_paths(posterior, y, 400_000, generator)
    after, taken = before, []
    for k in range(12):
        after, moved = corrections.sweep(posterior, after, 1 + k % posterior.steps, y, generator, None, candidates)
        taken.append(moved.mean((1, 2)))
    assert bool((torch.stack(taken)[:-1].mean(0) > 0.2).all()) and moved.shape == (3, 4000, 1)
    assert float((after[-1] != before[-1]).double().mean()) > 0.9
    mean, variance = coarse_truth(posterior.prior, 1.7)
    assert abs(float(truth[-1].mean()) - mean) < 0.01 and abs(float(truth[-1].var()) - variance) < 0.01
    for paths in (before, after):
        for level in (0, 2, posterior.steps):
            for j in range(2):
                x, m = paths[level, :, 0, j], float(truth[level, :, 0, j].mean())
                assert abs(z(x, m)) < 4.5 and abs(z((x - m) ** 2, float(truth[level, :, 0, j].var()))) < 4.5


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
    with torch.no_grad():
        posterior.log_scale -= 0.8
    near = renoise_mcmc(posterior, y, 300, generator, sweeps=12, burn_in=20).info
    assert 0.15 < float(near["acceptance"].mean()) < 0.35 and near["sweeps"] == 12  # a quarter is aimed at
    good = renoise_mcmc(mixture_posterior(), y, 300, generator, sweeps=4, burn_in=6).info
    assert good["level"] == posterior.steps and bool((good["forward_acceptance"] == 1).all())


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
        (lambda p, y: smc(p, y, twist="gradient"), "twist must be one of guide, likelihood, none, got 'gradient'"),
        (lambda p, y: smc(p, y, pilot=2), "pilot must be 0 or an integer of at least 3, got 2"),
        (lambda p, y: smc(p, y, twist="none", pilot=True), "pilot must be 0 or an integer of at least 3, got True"),
        (lambda p, y: smc(p, y, 8, pilot=17, budget=3 * p.evaluations()), "pilot must leave n of the 24 .* got 17; .* at most 16, or 0"),
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


# The budget

METHODS = {
    "importance": importance,
    "smc": smc,
    "renoise_mcmc": renoise_mcmc,
    "several candidates, burn-in": partial(renoise_mcmc, candidates=2, burn_in=3),
    "refine": refine,
}


def counted(posterior: Posterior) -> list[int]:
    """A counter of the states that pass through the posterior's network, or, where that is not learnt, the prior's in its place."""
    count, estimate = [0], posterior._estimate

    def hook(module, args):
        count[0] += args[1].numel() // posterior.shape.numel()

    def counting(x_t, t, learnt, *args):
        count[0] += int((~learnt).expand(x_t.shape[: x_t.ndim - len(posterior.shape)]).sum())
        return estimate(x_t, t, learnt, *args)

    posterior.network.register_forward_pre_hook(hook)
    posterior._estimate = counting
    return count


@pytest.mark.parametrize("budget", [None, 24.0, 31, 95.5])
@pytest.mark.parametrize("name", METHODS)
def test_evaluations_are_counted_and_within_the_budget(name, budget, generator):
    posterior, y = mixture_posterior(), torch.tensor([[0.7], [2.0], [-1.0]], dtype=D)
    count = counted(posterior)
    draws = METHODS[name](posterior, y, 10, generator, budget=budget)
    assert draws.x.shape == (10, 3, 2) and count[0] == draws.info["evaluations"] * 30
    if budget is not None:
        assert budget / 2 < draws.info["evaluations"] <= budget


@pytest.mark.parametrize("budget", [None, 24, 41.0])
@pytest.mark.parametrize("name", METHODS)
def test_second_looks_are_counted(name, budget, make_prior, generator):
    """Of a network of pixels, guided: a step takes one evaluation, or two."""
    prior = make_prior("pixels", steps=6)
    posterior = Posterior(prior, InverseProblem(lambda x: x.flatten(1)[:, :3], GaussianNoise(0.5)))
    looks = posterior.looks.tolist()
    assert 0 < sum(looks) < 6 and not looks[0]
    assert [posterior.evaluations(level) for level in range(7)] == [level + sum(looks[:level]) for level in range(7)]
    assert posterior.evaluations() == 6 + sum(looks) and Posterior(prior, posterior.problem, second_look=False).evaluations() == 6
    y, count = torch.zeros((2, 3)), counted(posterior)
    draws = METHODS[name](posterior, y, 4, generator, budget=budget)
    assert count[0] == draws.info["evaluations"] * 8
    assert budget is None or budget / 2 < draws.info["evaluations"] <= budget


@pytest.mark.parametrize("start", [True, False])
def test_a_start_costs_nothing(start, generator):
    posterior, y = mixture_posterior(), torch.tensor([[0.7]], dtype=D)
    count = counted(posterior)
    x = torch.zeros((10, 1, 2), dtype=D) if start else None
    info = renoise_mcmc(posterior, y, 10, generator, start=x, budget=8).info
    assert count[0] == 10 * info["evaluations"] and info["evaluations"] == 8


@pytest.mark.parametrize("method", [importance, smc])
def test_more_proposals_than_draws(method):
    """What a budget returns is the larger population, resampled: its log Z, and its error."""
    posterior, y = mixture_posterior("prior"), torch.tensor([[0.7], [2.0]], dtype=D)
    whole = method(posterior, y, 30, torch.Generator().manual_seed(1))
    draws = method(posterior, y, 10, torch.Generator().manual_seed(1), budget=3.9 * posterior.steps)
    torch.testing.assert_close(draws.log_z, whole.log_z)
    torch.testing.assert_close(draws.log_z_error, whole.log_z_error)
    torch.testing.assert_close(draws.info["ess"], whole.ess)
    assert draws.info["evaluations"] == 3 * posterior.steps and bool((draws.log_w == draws.log_w[:1]).all())
    for b in range(2):
        assert {tuple(x) for x in draws.x[:, b].tolist()} <= {tuple(x) for x in whole.x[:, b].tolist()}


def test_budgeted_draws_are_of_the_posterior(generator):
    """Off at first; resampled out of 8 times as many within 4.5 standard errors, which resampling only makes smaller."""
    posterior, y, n = mixture_posterior(), torch.full((60, 1), 0.7, dtype=D), 20
    with torch.no_grad():
        posterior.gate.fill_(0.6)
    truth = posterior.prior.posterior(MATRIX, NOISE, y[:1]).distribution.mean[0]
    raw = posterior.sample(y, n, generator).x.mean(0)
    for method in (importance, smc):
        x = method(posterior, y, n, generator, budget=8 * posterior.steps).x.mean(0)
        assert max(abs(z(raw[:, j], float(truth[j]))) for j in range(2)) > 5
        assert max(abs(z(x[:, j], float(truth[j]))) for j in range(2)) < 4.5


# Weights of 0


class Within(torch.nn.Module):
    """y = A(x) + uniform noise: the likelihood is 0 for an x too far off."""

    def sample(self, clean, generator=None):
        return clean + 4 * torch.rand(clean.shape, generator=generator, dtype=clean.dtype) - 2

    def log_prob(self, clean, y, event_dim):
        return torch.where((y - clean).abs() < 2, 0.0, -torch.inf).flatten(clean.ndim - event_dim).sum(-1).to(clean)


@pytest.mark.parametrize("start", ["guided", "prior"])
@pytest.mark.parametrize("name", METHODS)
def test_forbidden_draws_are_never_taken(name, start, generator):
    prior = GaussianMixturePrior.random(2, 4, 0, D, steps=6)
    posterior = Posterior(prior, InverseProblem(MATRIX, Within()), start, width=8)
    y = prior.sample(2, generator) @ MATRIX.T
    draws = METHODS[name](posterior, y, 60, generator)
    inside = (draws.x @ MATRIX.T - y).abs()[..., 0] < 2
    assert torch.equal(inside, ~draws.log_w.isneginf()) and bool(inside.any(0).all())
    assert torch.isfinite(draws.log_z).all() and torch.isfinite(draws.mean).all() and torch.isfinite(draws.log_z_error).all()
    assert bool(((draws.resample(400, generator).x @ MATRIX.T - y).abs() < 2).all())
    thinned = METHODS[name](posterior, y, 60, generator, budget=96).x if name in ("importance", "smc") else draws.x[:0]
    assert bool(((thinned @ MATRIX.T - y).abs() < 2).all())


@pytest.mark.parametrize("candidates", [1, 3])
def test_chains_that_start_where_they_may_not_be(candidates, generator):
    """They move inside, or keep the weight 0."""
    reward = Posterior(
        GaussianMixturePrior.random(2, 4, 0, D, steps=6), Reward(lambda x: torch.where(x[:, 0] > 0, 0.0, -torch.inf).to(x)), width=8
    )
    start = torch.full((50, 1, 2), -3.0, dtype=D)
    draws = renoise_mcmc(reward, None, 50, generator, start=start, sweeps=2, candidates=candidates)
    assert torch.equal(draws.log_w.isneginf(), draws.x[..., 0] <= 0)
    assert 0 < int(draws.log_w.isneginf().sum()) < 50


def test_one_draw_knows_no_error(generator):
    draws = importance(mixture_posterior(), torch.ones((2, 1), dtype=D), 1, generator)
    assert draws.ess.tolist() == [1.0, 1.0] and torch.equal(draws.log_z, draws.log_w[0])
    assert draws.log_z_error.isposinf().all() and draws.info["k_hat"].isposinf().all()
    assert renoise_mcmc(mixture_posterior(), torch.ones((2, 1), dtype=D), 1, generator, sweeps=5).x.shape == (1, 2, 2)
