"""Bad input of corrections: weights of 0, NaN and infinity, budgets and starts; one clear error each."""

import numpy as np
import pytest
import torch

from priors import GaussianMixturePrior
from rtb_inverse.corrections import importance, refine, renoise_mcmc, smc
from rtb_inverse.particles import Particles
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem, Reward

NAN, INF = float("nan"), float("inf")
PRIOR = GaussianMixturePrior.random(3, 3, 0, torch.float64, steps=3)
A = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, -0.5]], dtype=torch.float64)
Y = torch.zeros((4, 2), dtype=torch.float64)
POSTERIOR = Posterior(PRIOR, InverseProblem(A, GaussianNoise(0.5)), width=8)
CORRECTIONS = {"importance": importance, "smc": smc, "renoise_mcmc": renoise_mcmc, "refine": refine}


class Within(torch.nn.Module):
    """Uniform noise: a likelihood of 0 for all that is too far off."""

    def sample(self, clean, generator=None):
        return clean + 4 * torch.rand(clean.shape, generator=generator, dtype=clean.dtype) - 2

    def log_prob(self, clean, y, event_dim):
        return torch.where((y - clean).abs() < 2, 0.0, -INF).to(clean).flatten(clean.ndim - event_dim).sum(-1)


def rewarded(value: float, where) -> Posterior:
    """A reward of that value for some of the draws, once there are more than the three that are tried out."""

    def log_reward(x):
        return torch.where(where(x) & torch.tensor(len(x) > 3), value, 0.0).to(x)

    return Posterior(PRIOR, Reward(log_reward), width=8)


def first(x):
    return torch.arange(len(x)) == 0


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("start", ["guided", "prior"])
def test_no_draw_of_one_observation_is_possible(name, start):
    """A disconnected support that no proposal reaches: the observation is named."""
    posterior, y = Posterior(PRIOR, InverseProblem(A, Within()), start, width=8), Y.clone()
    y[:] = PRIOR.means[0] @ A.T
    y[2] = 1e6
    with pytest.raises(
        ValueError, match=r"above -infinity for one draw of every observation.* for observations \[2\] of 4: no draw"
    ) as caught:
        CORRECTIONS[name](posterior, y, 200, torch.Generator().manual_seed(0))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_likelihood_of_nan_or_infinity_at_one_draw(name, value):
    with pytest.raises(
        ValueError, match=r"log-likelihood .* must be below infinity and not NaN, got NaN or \+infinity in 1 of \d+ elements"
    ):
        CORRECTIONS[name](rewarded(value, first), None, 8, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_reward_of_minus_infinity(name):
    """Where it is -inf no draw is taken; where it is so everywhere, that is said."""
    half = rewarded(-INF, lambda x: x[:, 0] < 0)
    draws = CORRECTIONS[name](half, None, 64, torch.Generator().manual_seed(0))
    assert bool((draws.resample(generator=torch.Generator().manual_seed(0)).x[..., 0] >= 0).all())
    nowhere = rewarded(-INF, lambda x: torch.ones(len(x), dtype=torch.bool))
    with pytest.raises(ValueError, match=r"above -infinity for one draw of every observation at least, .* \[0\] of 1"):
        CORRECTIONS[name](nowhere, None, 8, torch.Generator().manual_seed(0))
    everywhere = Posterior(PRIOR, Reward(lambda x: torch.where(x[:, 0] < 9, -INF, 0.0)), width=8)  # when it is tried out, too
    assert everywhere.problem.y_shape == ()


@pytest.mark.parametrize("name", CORRECTIONS)
@pytest.mark.parametrize("budget", [NAN, -1.0, 0, INF, True, "12"])
def test_a_budget_that_is_none(name, budget):
    with pytest.raises(ValueError, match="budget must be a finite number above 0, got "):
        CORRECTIONS[name](POSTERIOR, Y, 8, budget=budget)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: importance(POSTERIOR, Y, 8, budget=b), "at least 3 network evaluations per draw, for one run of importance"),
        (lambda b: smc(POSTERIOR, Y, 8, budget=b), "at least 3 network evaluations per draw, for one run of smc"),
        (
            lambda b: renoise_mcmc(POSTERIOR, Y, 8, budget=b),
            "at least 5 network evaluations per draw, for a start and 0 \\+ 1 sweeps at level 1, candidates = 1",
        ),
        (
            lambda b: renoise_mcmc(POSTERIOR, Y, 8, burn_in=2, budget=b),
            "at least 9 network evaluations per draw, for a start and 2 \\+ 1 sweeps",
        ),
        (
            lambda b: refine(POSTERIOR, Y, 8, budget=b),
            "at least 7 network evaluations per draw, for a start and 0 \\+ 1 sweeps at level 1, candidates = 3",
        ),
        (lambda b: refine(POSTERIOR, Y, 8, candidates=2, budget=b), "at least 6 network evaluations per draw"),
    ],
)
def test_a_budget_too_small(call, message):
    with pytest.raises(ValueError, match=f"budget must be {message}.*, got 2.5"):
        call(2.5)


START = torch.zeros((8, 4, 3), dtype=torch.float64)


@pytest.mark.parametrize(
    ("start", "kind", "message"),
    [
        (START[:7], ValueError, r"start must have shape \(n, B, \*shape\) = \(8, 4, 3\), got \(7, 4, 3\)"),
        (START[:, :1], ValueError, r"start must have shape .* \(8, 4, 3\), got \(8, 1, 3\)"),
        (START[..., 0], ValueError, r"start must have shape .* \(8, 4, 3\), got \(8, 4\)"),
        (START + NAN, ValueError, "start must be finite, got NaN or infinity in 96 of 96 elements"),
        (START.long(), TypeError, "start must have a floating-point dtype, got torch.int64"),
        (START.numpy(), TypeError, "start must be a torch.Tensor, got ndarray"),
    ],
)
def test_bad_starts(start, kind, message):
    with pytest.raises(kind, match=message):
        renoise_mcmc(POSTERIOR, Y, 8, start=start)


def test_a_network_of_nan():
    posterior = Posterior(PRIOR, InverseProblem(A, GaussianNoise(0.5)), width=8)
    torch.nn.init.constant_(posterior.network.last.weight, NAN)
    for correct in CORRECTIONS.values():
        with pytest.raises(ValueError, match="must be below infinity and not NaN, got NaN"):
            correct(posterior, Y, 8)
    with pytest.raises(ValueError, match="x must be finite, got NaN or infinity in 96 of 96 elements"):
        posterior.sample(Y, 8)


@pytest.mark.parametrize(
    ("x", "log_w", "message"),
    [
        (torch.zeros(2, 3, 1), torch.zeros(2, 2), r"log_w must have shape \(N, B\), .* got \(2, 2\) and \(2, 3, 1\)"),
        (torch.zeros(0, 3, 1), torch.zeros(0, 3), r"log_w must have shape \(N, B\), N and B at least 1, .* got \(0, 3\)"),
        (torch.zeros(2, 3, 1), torch.full((2, 3), NAN), r"log_w must be below infinity and not NaN, .* in 6 of 6 elements"),
        (torch.zeros(2, 3, 1), torch.full((2, 3), INF), r"log_w must be below infinity and not NaN, .* in 6 of 6 elements"),
        (torch.full((2, 3, 1), NAN), torch.zeros(2, 3), r"x must be finite, got NaN or infinity in 6 of 6 elements"),
    ],
)
def test_bad_particles(x, log_w, message):
    with pytest.raises(ValueError, match=message):
        Particles(x, log_w)


def test_particles_of_weight_0():
    """Of the second observation none is possible, of the third one is."""
    log_w = torch.tensor([[0.0, -INF, -INF], [0.0, -INF, -3.0]])
    draws = Particles(torch.arange(6.0).reshape(2, 3, 1), log_w)
    assert draws.ess.tolist() == [2, 0, 1]
    torch.testing.assert_close(draws.log_z, torch.tensor([0.0, -INF, -3.0 - np.log(2)], dtype=torch.float32))
    torch.testing.assert_close(draws.log_z_error, torch.tensor([0.0, INF, 0.5**0.5]))
    for use in (lambda: draws.weights, lambda: draws.mean, lambda: draws.std, draws.resample):
        with pytest.raises(ValueError, match=r"log_w must be above -infinity .* got -infinity alone for observations \[1\] of 3"):
            use()
    assert Particles(draws.x[:, 2:], log_w[:, 2:]).resample(50).x.unique().tolist() == [5.0]
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        Particles(draws.x[:, :1], log_w[:, :1]).resample(0)
