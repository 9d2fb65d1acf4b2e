"""Behaviours: shapes, the statistics of the forward process, densities, shares. (What they draw from: test_pools.)

Statistical checks ask for |z| < 4.5 (a correct sampler fails one such element in 150,000 seeds) or state their own rate."""

from functools import cache

import pytest
import torch

from priors import GaussianMixturePrior
from rtb_inverse import behaviours
from rtb_inverse.behaviours import BEHAVIOURS, ObservationStore, check_weights, mixture, on_policy, replay, simulated
from rtb_inverse.chains import Trajectory, path_log_prob, rollout
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem, Reward

D, K, S = 3, 5, 6


@cache
def posterior_of(kind: str = "amortised", start: str = "prior") -> Posterior:
    """Not at the prior: log-scales and the last layer are moved, so that prior and posterior differ."""
    prior = GaussianMixturePrior.random(D, 4, 0, torch.float64, steps=K)
    generator = torch.Generator().manual_seed(1)
    if kind == "reward":
        problem = Reward(lambda x: -x.square().sum(-1))
    else:
        problem = InverseProblem(torch.randn((2, D), generator=generator, dtype=torch.float64), GaussianNoise(0.5))
    posterior = Posterior(prior, problem, start if kind != "reward" else None, width=16)
    with torch.no_grad():
        posterior.log_scale += 0.2 * torch.randn(K, generator=generator, dtype=torch.float64)
        posterior.network.last.weight += 0.3 * torch.randn(posterior.network.last.weight.shape, generator=generator, dtype=torch.float64)
    return posterior


def filled_store(posterior: Posterior, generator: torch.Generator, slots: int = S, capacity: int = 8) -> ObservationStore:
    """With x and y known, and three more x_0 in each buffer; for a reward, eight x_0."""
    if not posterior.amortised:
        store = ObservationStore(posterior.shape, None, capacity=capacity, options=posterior.prior._options())
        x = posterior.prior.sample(8, generator)[:, None]
        store.insert(torch.zeros(1, dtype=torch.long), x, posterior.log_likelihood(x, None))
        return store
    x = posterior.prior.sample(slots, generator)
    y = posterior.problem.simulate(x, generator)
    store = ObservationStore(posterior.shape, y, x, capacity)
    more = posterior.prior.sample(3 * slots, generator).reshape(3, slots, D)
    store.insert(torch.arange(slots), more, posterior.log_likelihood(more, y))
    return store


def increments(posterior: Posterior, x: torch.Tensor, levels: range) -> torch.Tensor:
    """(x_t - a x_s) / b of paths x (K + 1, N, B, d), for the moves from level l to l + 1 (0 is clean): standard normal under the
    forward process."""
    climbed, times = x.flip(0), posterior.times.flip(0)
    noise = []
    for level in levels:
        (alpha_s, sigma_s), (alpha_t, sigma_t) = (posterior.schedule.alpha_sigma(times[i]) for i in (level, level + 1))
        a = alpha_t / alpha_s
        noise.append((climbed[level + 1] - a * climbed[level]) / (sigma_t**2 - a**2 * sigma_s**2).sqrt())
    return torch.stack(noise)


def reverse_noise(posterior: Posterior, paths, steps: range) -> torch.Tensor:
    """(x_s - mean) / sd of the posterior's own Gaussian steps k."""
    noise = []
    for k in steps:
        step = posterior.transition(paths.x[k], paths.times[k], paths.times[k + 1], paths.y)
        noise.append((paths.x[k + 1] - step.mean) / step.stddev)
    return torch.stack(noise).detach()


def assert_standard_normal(noise: torch.Tensor, std: float = 1.0):
    """Mean 0 and variance std^2 at each level (first axis), over everything else."""
    for level in noise.flatten(1) / std:
        m = len(level)
        assert abs(float(level.mean())) * m**0.5 < 4.5
        assert abs(float(level.square().mean()) - 1) * (m / 2) ** 0.5 < 4.5


# Shapes


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in ("amortised", "reward") for n in BEHAVIOURS if (k, n) != ("reward", "simulated")]
)
def test_every_behaviour_gives_whole_paths(kind, name, n, generator):
    posterior = posterior_of(kind)
    store = filled_store(posterior, generator)
    index = torch.tensor([4, 0]) if kind == "amortised" else torch.zeros(1, dtype=torch.long)
    paths = BEHAVIOURS[name](posterior, store, index, n, generator)
    assert paths.x.shape == (K + 1, n, len(index), D)
    assert paths.x.dtype == torch.float64
    assert torch.isfinite(paths.x).all()
    assert torch.equal(paths.times, posterior.times)
    assert paths.steps == K
    if kind == "amortised":
        assert torch.equal(paths.y, store.y[index])
    else:
        assert paths.y is None
    assert not paths.x.requires_grad
    assert (paths.log_prob is not None) == (name == "on_policy")  # only the posterior's own paths come scored


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_draws_repeat_with_the_seed_and_differ_without(name):
    posterior = posterior_of()
    store = filled_store(posterior, torch.Generator().manual_seed(0))
    first, again, other = (
        BEHAVIOURS[name](posterior, store, torch.tensor([1, 2]), 4, torch.Generator().manual_seed(seed)).x for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# On-policy and prior


@pytest.mark.parametrize("extra_noise", [0.0, 0.7])
def test_on_policy_density_is_that_of_the_posterior(extra_noise, generator):
    posterior = posterior_of(start="guided")
    store = filled_store(posterior, generator)
    paths = on_policy(posterior, store, torch.arange(3), 4, generator, extra_noise=extra_noise)
    torch.testing.assert_close(paths.log_prob, path_log_prob(posterior, paths).detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("extra_noise", [0.0, 0.5, 2.0])
def test_extra_noise_widens_each_step(extra_noise, generator):
    posterior = posterior_of()
    store = filled_store(posterior, generator)
    paths = on_policy(posterior, store, torch.arange(3), 2000, generator, extra_noise=extra_noise)
    assert_standard_normal(reverse_noise(posterior, paths, range(K)), (1 + extra_noise**2) ** 0.5)


def test_prior_paths_do_not_see_y(generator):
    posterior = posterior_of()
    store = filled_store(posterior, generator)
    paths = BEHAVIOURS["prior"](posterior, store, torch.tensor([1, 2]), 3, torch.Generator().manual_seed(5))
    expected = rollout(posterior.prior, 3, store.y[[1, 2]], torch.Generator().manual_seed(5)).x
    assert torch.equal(paths.x, expected)


# Simulated and replayed


def test_simulated_paths_climb_from_the_x_that_made_y(generator):
    posterior = posterior_of()
    store = filled_store(posterior, generator)
    index = torch.tensor([5, 0, 2])
    truth = store.x_0[index, 0].clone()
    paths = simulated(posterior, store, index, 3000, generator)
    assert torch.equal(paths.x_0, truth.expand(3000, 3, D))
    assert_standard_normal(increments(posterior, paths.x, range(K)))


def test_simulated_keeps_the_truth_when_the_buffer_overflows(generator):
    posterior = posterior_of()
    store = filled_store(posterior, generator, capacity=4)
    truth = store.x_0[:, 0].clone()
    for n in (1, 3, 4, 9):
        store.insert(torch.arange(S), torch.full((n, S, D), 100.0 + n, dtype=torch.float64), torch.zeros((n, S), dtype=torch.float64))
        assert torch.equal(simulated(posterior, store, torch.arange(S), 2, generator).x_0[0], truth)
    assert bool((store.x_0[:, 1:] == 109.0).all())


def test_simulated_needs_a_truth(generator):
    posterior = posterior_of()
    store = ObservationStore(posterior.shape, torch.zeros((1, 2), dtype=torch.float64))
    with pytest.raises(ValueError, match="'simulated' needs observations simulated from known x"):
        simulated(posterior, store, torch.tensor([0]), 2, generator)


def among(x: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """For each of x (n, B, d), whether it is one of buffer (B, M, d) of its own observation: (n, B)."""
    return (x[:, :, None] == buffer[None]).all(-1).any(-1)


def test_replay_without_denoising_is_the_buffer_noised(generator):
    posterior = posterior_of()
    store = filled_store(posterior, generator)
    index = torch.tensor([3, 1])
    paths = replay(posterior, store, index, 3000, generator, denoise=0.0)
    held = store.x_0[index, :4]
    assert among(paths.x_0, held).all()
    assert not among(paths.x_0, held.flip(0)).any()  # each observation has its own
    assert_standard_normal(increments(posterior, paths.x, range(K)))


@pytest.mark.parametrize("level", [1, 3, K])
def test_replay_with_denoising_climbs_on_from_the_level(level, generator, monkeypatch):
    """Above the level the path is the forward process, below it the posterior's; x_0 is new."""
    posterior = posterior_of()
    store = filled_store(posterior, generator)
    index = torch.tensor([3, 1])
    monkeypatch.setattr(torch, "randint", lambda low, high, *args, **options: torch.tensor(level))
    paths = replay(posterior, store, index, 3000, generator, denoise=1.0)
    monkeypatch.undo()
    assert not among(paths.x_0, store.x_0[index, :4]).any()
    if level < K:
        assert_standard_normal(increments(posterior, paths.x, range(level, K)))
    assert_standard_normal(reverse_noise(posterior, paths, range(K - level, K)))


def test_replay_starts_its_second_descent_from_a_noised_buffer(generator, monkeypatch):
    """x at the level is alpha x_0 + sigma n: mean and variance for a buffer of one x_0."""
    posterior = posterior_of()
    x = posterior.prior.sample(1, generator)
    store = ObservationStore(posterior.shape, posterior.problem.simulate(x, generator), x)
    monkeypatch.setattr(torch, "randint", lambda low, high, *args, **options: torch.tensor(2))
    paths = replay(posterior, store, torch.tensor([0]), 4000, generator, denoise=1.0)
    alpha, sigma = posterior.schedule.alpha_sigma(posterior.times[K - 2])
    assert_standard_normal(((paths.x[K - 2] - alpha * x) / sigma)[None])


def test_replay_levels_are_uniform(generator, monkeypatch):
    """Chi-square of 1,000 levels in 1 .. K: 4 degrees of freedom, a uniform draw exceeds 23.5 once in 10,000 seeds."""
    posterior = posterior_of()
    store = filled_store(posterior, generator)
    levels = []

    def note(chain, x, generator, **options):
        levels.append(options.get("to_level"))
        raise StopIteration

    monkeypatch.setattr(behaviours, "renoise", note)
    for _ in range(1000):
        with pytest.raises(StopIteration):
            replay(posterior, store, torch.tensor([0]), 2, generator, denoise=1.0)
    counts = torch.bincount(torch.tensor(levels), minlength=K + 1)
    assert counts[0] == 0
    assert len(counts) == K + 1
    assert float(((counts[1:] - 200) ** 2 / 200).sum()) < 23.5


@pytest.mark.parametrize(("n", "denoise", "again"), [(8, 0.5, 4), (3, 0.0, 0), (3, 1.0, 3), (4, 0.25, 1)])
def test_replay_denoises_its_share(n, denoise, again, generator):
    posterior = posterior_of()
    store = filled_store(posterior, generator)
    index = torch.arange(2)
    old = among(replay(posterior, store, index, n, generator, denoise=denoise).x_0, store.x_0[index, :4])
    assert old.sum(0).tolist() == [n - again] * 2


# Mixtures


def stub(monkeypatch):
    """Behaviours that draw nothing, to count with."""

    def none(posterior, store, index, n, generator, **options):
        return Trajectory(torch.zeros((2, n, 1, 1)), torch.tensor([1.0, -1.0], dtype=torch.float64))

    monkeypatch.setattr(behaviours, "BEHAVIOURS", dict.fromkeys(BEHAVIOURS, none))


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("weights", [{"on_policy": 2, "replay": 1, "simulated": 1}, {"prior": 0.13, "on_policy": 0.8, "replay": 0.07}])
def test_shares_follow_the_weights_on_average(weights, n, generator, monkeypatch, assert_mean):
    stub(monkeypatch)
    total, counts = sum(weights.values()), []
    for _ in range(1500):
        paths, shares = mixture(weights, None, None, None, n, generator)
        assert paths.x.shape[1] == sum(shares.values()) == n
        counts.append([shares.get(name, 0) for name in weights])
        for name, count in zip(weights, counts[-1], strict=True):
            assert abs(count - n * weights[name] / total) < 1  # systematic: never a whole path off
    counts = torch.tensor(counts, dtype=torch.float64)
    expected = torch.tensor([n * w / total for w in weights.values()])
    varies = (expected % 1).minimum(1 - expected % 1) > 1e-9
    if varies.any():
        assert_mean(counts[:, varies], expected[varies])
    assert torch.equal(counts[:, ~varies], expected[~varies].round().double().expand(len(counts), -1))


def test_mixture_puts_scored_paths_first(generator):
    posterior = posterior_of()
    store = filled_store(posterior, generator)
    weights = {"replay": 1, "simulated": 1, "on_policy": 2, "prior": 1}
    paths, shares = mixture(weights, posterior, store, torch.tensor([2, 4]), 10, generator)
    assert next(iter(shares)) == "on_policy"
    assert shares == {"on_policy": 4, "replay": 2, "simulated": 2, "prior": 2}
    assert paths.x.shape == (K + 1, 10, 2, D)
    assert paths.log_prob.shape == (4, 2)
    torch.testing.assert_close(paths.log_prob, path_log_prob(posterior, paths.draws(slice(4))).detach(), rtol=1e-10, atol=1e-10)
    assert torch.equal(paths.y, store.y[[2, 4]])


def test_extra_noise_is_for_on_policy_paths_only(generator):
    """A mixture of on-policy (with noise) and simulated paths: the former's steps are wider, the latter are the forward process."""
    posterior = posterior_of()
    store = filled_store(posterior, generator)
    paths, shares = mixture({"on_policy": 1, "simulated": 1}, posterior, store, torch.arange(2), 4000, generator, extra_noise=1.0)
    fresh = shares["on_policy"]
    assert_standard_normal(reverse_noise(posterior, paths.draws(slice(fresh)), range(K)), 2**0.5)
    assert_standard_normal(increments(posterior, paths.x[:, fresh:], range(K)))


def test_weights_are_normalised():
    assert check_weights({"on_policy": 3, "replay": 1, "prior": 0}) == {"on_policy": 0.75, "replay": 0.25}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"on_polcy": 1.0}, "behaviours must be one of on_policy, prior, simulated, replay, got 'on_polcy'"),
        ({"on_policy": 1.0, "replay": -0.1}, "behaviours: the weight of 'replay' must be finite and at least 0, got -0.1"),
        ({"on_policy": float("nan")}, "weight of 'on_policy' must be finite"),
        ({"on_policy": float("inf")}, "weight of 'on_policy' must be finite"),
        ({"on_policy": 0.0}, "behaviours must have a weight above 0"),
        ({}, "behaviours must have a weight above 0"),
    ],
)
def test_weights_are_checked(weights, message):
    with pytest.raises(ValueError, match=message):
        check_weights(weights)


# Parts of paths


def test_a_path_is_its_upper_part_and_what_is_below(generator):
    posterior = posterior_of()
    paths = on_policy(posterior, filled_store(posterior, generator), torch.arange(3), 2, generator)
    upper = Trajectory(paths.x[:3], paths.times[:3], paths.y)
    lower = Trajectory(paths.x[2:], paths.times[2:], paths.y, given_start=True)
    assert lower.draws(slice(1)).given_start
    torch.testing.assert_close(path_log_prob(posterior, upper) + path_log_prob(posterior, lower), path_log_prob(posterior, paths))


@pytest.mark.parametrize("level", [1, 2, K])
def test_the_exact_posterior_balances_below_any_state(level, generator):
    """log q - log p - log lik of paths that share x_t is one number, - log h(x_t, y); of the prior's own paths it is not."""
    prior = GaussianMixturePrior.random(D, 4, 0, torch.float64, steps=K)
    A, noise = torch.randn((2, D), generator=generator, dtype=torch.float64), 0.5
    problem = InverseProblem(A, GaussianNoise(noise), shape=(D,))
    y = problem.simulate(prior.sample(6, generator), generator)
    roots = rollout(prior, 1, y, generator).x[K - level]  # any states will do
    spread = {}
    for name, chain in (("exact", prior.posterior(A, noise, y)), ("prior", prior)):
        below = rollout(chain, 50, y, generator, start=roots.expand(50, *roots.shape[1:]), level=level)
        residual = below.log_prob - path_log_prob(prior, below) - problem.log_likelihood(below.x_0, y)
        spread[name] = float(residual.std(0).max())
    assert spread["exact"] < 1e-8 < 1e-2 < spread["prior"]
