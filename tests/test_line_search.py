"""The line search that ends a warm start: what it finds, what it is measured on, and that training never loosens what it measures."""

import pytest
import torch
from torch import nn

from priors import GaussianMixturePrior
from rtb_inverse import GaussianNoise, InverseProblem, Posterior, PosteriorTraining, fit
from rtb_inverse.bounds import BoundsOverTraining
from rtb_inverse.training import line_search

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

    kept = line_search(trained, start, loss)
    assert kept == pytest.approx(min(max(best, 0), 1)) and calls[:3] == [0.0, 0.5, 1.0] and len(calls) <= 4
    assert float(trained[1].detach()) == pytest.approx(4 * kept - 1)


def test_what_leaves_the_finite_numbers_is_not_kept():
    trained = [nn.Parameter(torch.tensor(1.0))]
    kept = line_search(trained, [torch.tensor(0.0)], lambda: trained[0] if trained[0] < 0.3 else torch.tensor(torch.nan))
    assert kept == 0.0 == float(trained[0].detach())


def test_a_ruinous_training_ends_where_it_began(make_prior):
    """A learning rate of 10 for six steps: without the line search what comes out is far worse than what went in."""
    gaps = {}
    for search in (True, False):
        p = posterior(make_prior("pixels"))
        held = BoundsOverTraining(p, observations=64, seed=5)
        untrained = held.gap()
        fit(p, 6, 0, lr=10.0, line_search=search, **TRAINING)
        gaps[search] = held.gap()
    assert gaps[True] <= untrained + 0.05 < gaps[False] - 1


def test_a_training_that_learns_is_kept():
    """From the prior on, there is much to learn and fresh pairs at every step: nearly all is kept."""
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    p = posterior(GaussianMixturePrior(torch.ones(2), means, 0.2 * torch.eye(2).expand(2, 2, 2), steps=6), start="prior")
    kept = []

    def spy(parameters, start, loss):
        kept.append(line_search(parameters, start, loss))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rtb_inverse.lightning.line_search", spy)
        fit(p, 150, 0, **TRAINING)
    assert len(kept) == 1 and kept[0] > 0.7


def test_one_y_is_specialised_on_without_a_warm_start_and_never_for_the_worse(make_prior):
    """By default every step takes paths of that y, no pair is simulated; ruined by its learning rate, it is as before."""
    p = posterior(make_prior("pixels"))
    y = torch.tensor([0.3, -0.2])
    module = PosteriorTraining(p, y)
    assert module.warm_start == 0 and PosteriorTraining(p).warm_start == 0.9
    before, held = [v.detach().clone() for v in p.trainable()], BoundsOverTraining(p, y[None], observations=256, seed=3)
    untrained = held.gap()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rtb_inverse.lightning.Pool", None)  # not called
        fit(p, 6, 0, y=y, lr_rtb=0.1, progress=False, bounds=0, head_draws=0)
    assert all(torch.equal(v, w) for v, w in zip(before, p.trainable(), strict=True)) and held.gap() == untrained
    fit(p, 6, 0, y=y, lr_rtb=0.1, progress=False, bounds=0, head_draws=0, line_search=False)
    assert held.gap() > untrained + 1
