"""Behaviours: shapes, the statistics of the forward process, densities, buffers, shares.

Statistical checks ask for |z| < 4.5 (a correct sampler fails one such element in 150,000 seeds) or state their own rate."""

from functools import cache

import pytest
import torch
from conftest import Coarse

from priors import GaussianMixturePrior
from rtb_inverse import behaviours
from rtb_inverse.behaviours import BEHAVIOURS, ObservationStore, Pool, check_weights, mixture, on_policy, replay, simulated
from rtb_inverse.chains import Trajectory, forward_bridge, path_log_prob, rollout
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


# The buffer


def test_good_follows_the_reward_with_a_floor(generator):
    """Chi-square of 40,000 picks against (1 - u) softmax + u / held; 3 degrees of freedom, exceeded at 21.1 once in 10,000 seeds."""
    rewards = torch.tensor([[0.0, 2.0, -30.0, 1.0], [5.0, 5.0, 5.0, 4.0]], dtype=torch.float64)
    store = ObservationStore((1,), torch.zeros((2, 1), dtype=torch.float64), capacity=7, uniform=0.3)
    names = torch.arange(8, dtype=torch.float64).reshape(2, 4)
    store.insert(torch.arange(2), names.T[..., None], rewards.T)
    for order in ([0, 1], [1, 0]):
        picks = store.good(torch.tensor(order), 40_000, generator)[..., 0]
        assert picks.shape == (40_000, 2)
        for column, slot in zip(picks.T, order, strict=True):
            weights = [float(r) for r in rewards[slot].exp()]
            counts = torch.bincount(column.long() - 4 * slot, minlength=4)
            assert int(counts.sum()) == 40_000
            assert len(counts) == 4  # never one of the other observation, never an empty place
            expected = torch.tensor([40_000 * (0.7 * w / sum(weights) + 0.3 / 4) for w in weights])
            assert float(((counts - expected) ** 2 / expected).sum()) < 21.1


def test_good_without_a_floor_takes_the_best(generator):
    store = ObservationStore((1,), torch.zeros((1, 1)), capacity=3, uniform=0.0)
    store.insert(torch.tensor([0]), torch.tensor([[[1.0]], [[2.0]], [[3.0]]]), torch.tensor([[0.0], [500.0], [0.0]]))
    assert bool((store.good(torch.tensor([0]), 50, generator) == 2.0).all())


def test_good_refuses_an_empty_buffer(generator):
    store = ObservationStore((1,), torch.zeros((2, 1)))
    store.insert(torch.tensor([1]), torch.ones((1, 1, 1)), torch.zeros((1, 1)))
    with pytest.raises(RuntimeError, match="buffer is empty"):
        store.good(torch.tensor([0, 1]), 2, generator)


def test_a_nan_reward_is_not_held(generator):
    store = ObservationStore((1,), torch.zeros((1, 1)), capacity=2)
    store.insert(torch.tensor([0]), torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[torch.nan], [0.0]]))
    assert bool((store.good(torch.tensor([0]), 50, generator) == 2.0).all())


@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1], [2, 2, 2], [5], [3, 1], [7, 2]])
def test_first_in_first_out(sizes):
    """Whatever the sizes of the insertions, the last three are held; other observations are left alone."""
    store = ObservationStore((1,), torch.zeros((3, 1)), capacity=3)
    stream, rewards = torch.arange(1.0, 1 + sum(sizes)), torch.arange(sum(sizes)) / 10
    at = 0
    for size in sizes:
        part = slice(at, at + size)
        values = torch.stack([stream[part], 100 + stream[part]], 1)[..., None]
        store.insert(torch.tensor([2, 0]), values, rewards[part, None].expand(-1, 2))
        at += size
    for slot, offset in ((2, 0), (0, 100)):
        held = sorted(zip(store.x_0[slot, :, 0].tolist(), store.log_reward[slot].tolist(), strict=True))
        expected = [(float(v + offset), float(r)) for v, r in zip(stream[-3:], rewards[-3:], strict=True)]
        assert held == expected
    assert not torch.isfinite(store.log_reward[1]).any()


def test_renew_starts_a_buffer_anew(generator):
    posterior = posterior_of()
    store = filled_store(posterior, generator)
    y, x_0, reward = store.y.clone(), store.x_0.clone(), store.log_reward.clone()
    index = torch.tensor([4, 1])
    x_new, y_new = torch.full((2, D), 7.0, dtype=torch.float64), torch.full((2, 2), 8.0, dtype=torch.float64)
    store.renew(index, x_new, y_new, torch.tensor([0.5, 0.6], dtype=torch.float64))
    others = torch.tensor([0, 2, 3, 5])
    for now, before in ((store.y, y), (store.x_0, x_0), (store.log_reward, reward)):
        assert torch.equal(now[others], before[others])
    assert torch.equal(store.observations(index), y_new)
    assert store.log_reward[4, 0] == 0.5
    assert store.log_reward[1, 0] == 0.6
    assert bool((store.good(index, 50, generator) == 7.0).all())  # what was held before is gone
    assert bool((simulated(posterior, store, index, 2, generator).x_0 == 7.0).all())
    store.insert(index, x_new[None] + 1, torch.zeros((1, 2), dtype=torch.float64))
    assert bool((store.x_0[index, 1] == 8.0).all())


def test_choose_takes_each_observation_once(generator):
    """And each as often as the others: 6 of 10, 500 times; each count is binomial(500, 0.6)."""
    store = ObservationStore((1,), torch.zeros((10, 1)))
    picks = torch.stack([store.choose(6, generator) for _ in range(500)])
    assert all(len(set(row)) == 6 for row in picks.tolist())
    counts = torch.bincount(picks.flatten(), minlength=10)
    assert float((counts - 300).abs().max()) / (500 * 0.6 * 0.4) ** 0.5 < 4.5
    assert sorted(store.choose(99, generator).tolist()) == list(range(10))
    assert len(ObservationStore((1,), None).choose(8, generator)) == 1


def test_store_state_round_trip(generator):
    posterior = posterior_of()
    store = filled_store(posterior, generator)
    saved = {name: value.clone() for name, value in store.state_dict().items()}
    other = filled_store(posterior, torch.Generator().manual_seed(77))
    assert not torch.equal(other.x_0, store.x_0)
    other.load_state_dict(saved)
    for name, value in saved.items():
        assert torch.equal(getattr(other, name), value)
    index, more, reward = torch.arange(S), torch.ones((2, S, D), dtype=torch.float64), torch.ones((2, S), dtype=torch.float64)
    for each in (store, other):  # the place of the next insertion came along
        each.insert(index, more, reward)
    assert torch.equal(other.x_0, store.x_0)
    first, second = (each.good(index, 5, torch.Generator().manual_seed(1)) for each in (store, other))
    assert torch.equal(first, second)


@pytest.mark.parametrize("uniform", [-0.1, 1.1, float("nan")])
def test_the_floor_is_a_share(uniform):
    with pytest.raises(ValueError, match=r"uniform must be in \[0, 1\]"):
        ObservationStore((1,), None, uniform=uniform)


# The pool


class Counting(GaussianMixturePrior):
    drawn = 0

    exact_reversal = False  # so that its roll-outs are kept, and counted

    def initial(self, sample_shape):
        self.drawn += sample_shape[0]
        return super().initial(sample_shape)


def counting_posterior() -> Posterior:
    prior = Counting.random(D, 4, 0, torch.float64, steps=2)
    posterior = Posterior(prior, InverseProblem(torch.eye(D, dtype=torch.float64)[:2], GaussianNoise(0.5)), width=8)
    prior.drawn = 0
    return posterior


def test_pool_grows_up_to_its_size_and_reuses(generator):
    posterior = counting_posterior()
    pool = Pool(posterior, size=50)
    pool.grow(30, generator)
    first = pool.x.clone()
    assert first.shape == (30, D)
    pool.grow(30, generator)
    assert pool.x.shape == (50, D)
    assert torch.equal(pool.x[:30], first)
    pool.grow(30, generator)
    assert pool.x.shape == (50, D)
    for _ in range(3):
        x_0, y = pool.pairs(200, generator)
        assert x_0.shape == (200, D)
        assert y.shape == (200, 2)
        assert (x_0[:, None] == pool.x[None]).all(-1).any(1).all()
    assert posterior.prior.drawn == 50  # pairs cost no draw of the prior


def test_pool_pairs_are_of_the_joint(generator):
    """Every x evenly (chi-square with 9 degrees of freedom, exceeded at 33.7 once in 10,000 seeds); y - A x is the noise."""
    pool = Pool(counting_posterior(), size=10)
    pool.grow(10, generator)
    x_0, y = pool.pairs(20_000, generator)
    counts = (x_0[:, None] == pool.x[None]).all(-1).sum(0)
    assert float(((counts - 2000.0) ** 2 / 2000).sum()) < 33.7
    assert_standard_normal(((y - x_0[:, :2]) / 0.5).T)


def test_pool_of_the_users_data(generator):
    posterior = counting_posterior()
    data = torch.arange(4 * D, dtype=torch.float32).reshape(4, D)
    pool = Pool(posterior, data=data)
    pool.grow(100, generator)
    assert posterior.prior.drawn == 0
    x_0, _ = pool.pairs(100, generator)
    assert x_0.dtype == torch.float64
    assert set(x_0[:, 0].tolist()) == {0.0, 3.0, 6.0, 9.0}
    assert pool.state_dict() == {}  # the user brings it again
    other = Pool(posterior, data=data)
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other.x, pool.x)


def test_an_exact_prior_draws_anew(generator):
    posterior = posterior_of()
    pool = Pool(posterior)
    pool.grow(100, generator)
    assert len(pool) == 0 and pool.state_dict() == {}
    draws = torch.cat([pool.pairs(500, generator)[0] for _ in range(4)])
    assert len(draws.unique(dim=0)) == 2000
    again = torch.Generator().manual_seed(1)
    x_0, y = pool.pairs(3, torch.Generator().manual_seed(1))
    assert torch.equal(x_0, posterior.prior.sample(3, again)) and torch.equal(y, posterior.problem.simulate(x_0, again))


def test_pool_state_round_trip(generator):
    posterior = counting_posterior()
    pool, other = Pool(posterior), Pool(posterior)
    pool.grow(12, generator)
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other.x, pool.x)
    (x, y), (x_again, y_again) = (p.pairs(5, torch.Generator().manual_seed(2)) for p in (pool, other))
    assert torch.equal(x, x_again)
    assert torch.equal(y, y_again)


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


def test_pool_keeps_whole_paths_of_an_inexact_chain(make_prior, generator):
    """A network's chain is not the forward process reversed: what is kept are its own roll-outs, with y from their ends."""
    prior = make_prior("unet2d")
    posterior = Posterior(prior, InverseProblem(torch.nn.Flatten(), GaussianNoise(0.5)))
    pool = Pool(posterior, size=6)
    pool.grow(4, torch.Generator().manual_seed(3))
    again = rollout(prior, 4, None, torch.Generator().manual_seed(3))
    assert torch.equal(pool.states, again.x[:, :, 0])
    bridges, y = pool.bridges(2000, generator)
    index = torch.stack([(x_t == pool.states[k]).flatten(1).all(1) for k, x_t in zip(bridges.k, bridges.x_t, strict=True)]).int().argmax(1)
    assert torch.equal(pool.states[bridges.k, index], bridges.x_t)
    assert_standard_normal(((y - pool.x[index].flatten(1)) / 0.5).T)  # levels of one path stay together
    last = bridges.k == prior.steps - 1
    torch.testing.assert_close(bridges.mean[last], pool.x[index][last], atol=1e-4, rtol=1e-4)
    other = Pool(posterior)
    other.load_state_dict(pool.state_dict())
    assert torch.equal(other.states, pool.states) and torch.equal(other.means, pool.means) and torch.equal(other.moments, pool.moments)


def test_bridges_of_an_inexact_chain_are_its_own(generator):
    """x_s of fresh paths less the mean of their bridge says nothing of x_0, and spreads as the bridge says; with the forward process's
    bridge it does. (|z| < 4.5 in nine checks, where pool and fresh paths err alike; a correct bridge fails once in 15,000 seeds.)"""
    prior, n = Coarse(6), 40_000
    pool = Pool(Posterior(prior, InverseProblem(torch.nn.Flatten(), GaussianNoise(0.5)), width=8), size=n)
    pool.grow(n, generator)
    bridges, _ = pool.bridges(4000, generator)
    fresh = rollout(prior, n, None, generator, keep_means=True)
    x_0, off = fresh.x_0[:, 0], []
    for k in range(4):
        m, b = fresh.means[k, :, 0], forward_bridge(prior, torch.full((n,), k), fresh.x[k, :, 0], x_0)[0]
        rho, sd = pool.moments[1, k] / pool.moments[0, k], bridges.sd[bridges.k == k][0]
        if k == 3:
            assert float(rho) == pytest.approx(1) and float(sd) < 1e-6
            continue

        def z(values):
            return float(values.mean() / values.std() * (values.numel() / 2) ** 0.5)

        residual = (fresh.x[k + 1, :, 0] - m - rho * (b - m)) / sd
        assert abs(z(residual * (x_0 - 1))) < 4.5 and abs(z(residual)) < 4.5 and abs(z(residual**2 - 1)) < 4.5
        off.append(abs(z((fresh.x[k + 1, :, 0] - b) * (x_0 - 1))))
    assert max(off) > 10


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
