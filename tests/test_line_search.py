"""The line search that ends a warm start: what it finds, what it is measured on, and that training never loosens what it measures."""

import pytest
import torch
from torch import nn

from priors import GaussianMixturePrior
from rtb_inverse import GaussianNoise, InverseProblem, Posterior, fit
from rtb_inverse.behaviours import Pool
from rtb_inverse.chains import Bridges, forward_bridge
from rtb_inverse.training import denoising_loss, line_search

TRAINING = {"progress": False, "bounds": 0, "warm_start": 1.0, "states": 64, "pool": 64, "pool_start": 64, "pool_growth": 0}


def posterior(prior, **options) -> Posterior:
    matrix = torch.eye(int(prior.shape.numel()))[:2]
    return Posterior(prior, InverseProblem(lambda x: x.flatten(1) @ matrix.T.to(x), GaussianNoise(0.3)), width=16, **options)


@pytest.mark.parametrize("best", [0.0, 0.3, 0.85, 1.0, 1.7, -0.5])
def test_the_least_loss_on_the_line(best):
    """Of a parabola whose lowest point is given: at it, or at the nearer end."""
    start = [torch.tensor([1.0, 2.0]), torch.tensor(-1.0)]
    trained = [nn.Parameter(torch.tensor([2.0, 0.0])), nn.Parameter(torch.tensor(3.0))]
    calls = []

    def loss():
        s = float(trained[1] + 1) / 4
        torch.testing.assert_close(trained[0].detach(), torch.tensor([1 + s, 2 - 2 * s]))
        calls.append(s)
        return torch.tensor((s - best) ** 2)

    kept = line_search(trained, start, loss, evaluations=9)
    assert kept == pytest.approx(min(max(best, 0), 1), abs=0.02) and len(calls) <= 9
    assert float(trained[1].detach()) == pytest.approx(4 * kept - 1)


def test_what_leaves_the_finite_numbers_is_not_kept():
    trained = [nn.Parameter(torch.tensor(1.0))]
    kept = line_search(trained, [torch.tensor(0.0)], lambda: trained[0] if trained[0] < 0.3 else torch.tensor(torch.nan))
    assert kept == 0.0 == float(trained[0].detach())


@pytest.mark.parametrize("kind", ["mixture", "pixels"])
def test_unseen_pairs_are_new_and_of_every_step(kind, make_prior, generator):
    p = posterior(make_prior(kind))
    pool = Pool(p, size=8)
    pool.grow(8, generator)
    bridges, y = pool.unseen(5, generator)
    K = p.steps
    assert bridges.k.tolist() == [k for k in range(K) for _ in range(5)]
    assert bridges.x_t.shape == bridges.mean.shape == (5 * K, *p.shape) and bridges.sd.shape == (5 * K,) and y.shape == (5 * K, 2)
    assert torch.equal(y[:5], y[-5:]) and len(y[:5].unique(dim=0)) == 5
    assert len(pool) == (8 if pool.keeps_paths else 0)
    if pool.keeps_paths:  # of the pool's own law: the regression of x_s, on the same moments
        assert not torch.isin(bridges.x_t, pool.states).any()
        again = pool._between(bridges.k, bridges.x_t, bridges.mean, bridges.x_t)
        torch.testing.assert_close(again.sd, bridges.sd)
    else:  # the process noised forward: no spread but its own
        sd = forward_bridge(p.prior, bridges.k, bridges.x_t, bridges.x_t)[1]
        torch.testing.assert_close(bridges.sd, sd)


def test_bridges_in_parts():
    bridges = Bridges(torch.arange(5), torch.randn(5, 2), torch.randn(5, 2), torch.rand(5))
    parts = bridges.split(2)
    assert [len(part.k) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.mean for part in parts]), bridges.mean)


def test_a_ruinous_training_ends_where_it_began(make_prior):
    """A learning rate of 10 for six steps: without the line search what comes out is far worse than what went in."""
    losses = {}
    for search in (True, False):
        p = posterior(make_prior("pixels"))
        before = [q.detach().clone() for q in p.trainable()]
        fit(p, 6, 0, lr=10.0, line_search=search, **TRAINING)
        bridges, y = pool_of(p).unseen(64, torch.Generator().manual_seed(5))
        with torch.no_grad():
            losses[search] = float(denoising_loss(p, bridges, y))
            for q, old in zip(p.trainable(), before, strict=True):
                q.copy_(old)
            losses["untrained"] = float(denoising_loss(p, bridges, y))
    assert losses[True] <= losses["untrained"] + 0.05 < losses[False] - 1


def pool_of(p: Posterior) -> Pool:
    pool = Pool(p, size=256)
    pool.grow(256, torch.Generator().manual_seed(4))
    return pool


def test_a_training_that_learns_is_kept():
    """From the prior on, there is much to learn and fresh pairs at every step: nearly all is kept."""
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    p = posterior(GaussianMixturePrior(torch.ones(2), means, 0.2 * torch.eye(2).expand(2, 2, 2), steps=6), start="prior")
    kept = []

    def spy(parameters, start, loss, evaluations=9):
        kept.append(line_search(parameters, start, loss, evaluations))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rtb_inverse.lightning.line_search", spy)
        fit(p, 150, 0, **TRAINING)
    assert len(kept) == 1 and kept[0] > 0.7
