"""What is kept to train on: the buffer of good draws of each observation, and the pool of a prior's roll-outs.

Statistical checks ask for |z| < 4.5 (a correct sampler fails one such element in 150,000 seeds) or state their own rate."""

import pytest
import torch
from conftest import Coarse
from test_behaviours import D, S, assert_standard_normal, filled_store, posterior_of

from priors import GaussianMixturePrior
from rtb_inverse.behaviours import ObservationStore, Pool, simulated
from rtb_inverse.chains import forward_bridge, rollout
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem

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
