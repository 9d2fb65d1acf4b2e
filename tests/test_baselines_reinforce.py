r"""REINFORCE against the closed forms of a Gaussian, q = N(mu, s^2), p = N(0, 1), y = x + noise.

A z-score of a mean over 100,000 independent groups; a correct gradient fails |z| < 4.5 once in 150,000, and a wrong one must be seen at
|z| > 20."""

import math

import numpy as np
import pytest
import torch

from rtb_inverse.baselines import reinforce
from rtb_inverse.baselines.reinforce import leave_one_out
from rtb_inverse.objectives import rtb, vargrad

D = torch.float64
MU, LOG_S, Y, NOISE = 0.6, math.log(1.2), 1.5, 0.8
PAIRS = [(kl, place) for kl in ("k1", "k2", "k3") for place in ("reward", "loss")]
UNBIASED = [("k1", "reward"), ("k2", "loss")]


def log_normal(x, mean, std):
    return -0.5 * ((x - mean) / std) ** 2 - torch.as_tensor(std, dtype=D).log() - 0.5 * math.log(2 * math.pi)


def expected_cost(mu, log_s):
    """E_q[- log lik]."""
    return ((Y - mu) ** 2 + (2 * log_s).exp()) / (2 * NOISE**2) + math.log(NOISE) + 0.5 * math.log(2 * math.pi)


def reverse_kl(mu, log_s):
    """KL(q || p)."""
    return ((2 * log_s).exp() + mu**2 - 1) / 2 - log_s


def forward_kl(mu, log_s):
    """KL(p || q)."""
    return log_s + (1 + mu**2) / (2 * (2 * log_s).exp()) - 0.5


def mean_k2_held_fixed(mu, log_s):
    """E_q k2 with k2's own q held fixed, by a quadrature that is exact for this polynomial."""
    nodes, weights = (torch.as_tensor(c) for c in np.polynomial.hermite_e.hermegauss(12))
    x = mu + log_s.exp() * nodes
    log_r = log_normal(x, 0.0, 1.0) - log_normal(x, MU, math.exp(LOG_S))
    return (weights * log_r**2 / 2).sum() / weights.sum()


PENALTY = {  # what the KL term of each variant descends, as the module says
    ("k1", "reward"): reverse_kl,
    ("k2", "reward"): mean_k2_held_fixed,
    ("k3", "reward"): lambda mu, log_s: reverse_kl(mu, log_s) - forward_kl(mu, log_s),
    ("k1", "loss"): lambda mu, log_s: 0 * mu,
    ("k2", "loss"): reverse_kl,
    ("k3", "loss"): forward_kl,
}


def gradient_of(function) -> torch.Tensor:
    """In mu and log s, by autograd through a closed form."""
    mu, log_s = (torch.tensor(v, dtype=D, requires_grad=True) for v in (MU, LOG_S))
    value = expected_cost(mu, log_s) + function(mu, log_s)
    return torch.stack(torch.autograd.grad(value, (mu, log_s)))


def on_policy(groups: int, n: int = 4, seed: int = 0):
    """n draws of q for each group, whose own copies of mu and log s collect that group's gradient."""
    mu, log_s = (torch.full((groups,), v, dtype=D, requires_grad=True) for v in (MU, LOG_S))
    noise = torch.randn((n, groups), generator=torch.Generator().manual_seed(seed), dtype=D)
    x = (mu + log_s.exp() * noise).detach()
    log_q = -0.5 * ((x - mu) / log_s.exp()) ** 2 - log_s - 0.5 * math.log(2 * math.pi)
    return (mu, log_s), log_q, log_normal(x, 0.0, 1.0), log_normal(x, Y, NOISE)


def gradients(groups: int = 100_000, **options) -> torch.Tensor:
    """Of independent groups, (groups, 2)."""
    parameters, log_q, log_p, log_lik = on_policy(groups)
    loss = reinforce(log_q, log_p, log_lik, **options)
    return torch.stack(torch.autograd.grad(loss * groups, parameters), -1)


def z_scores(samples: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    return (samples.mean(0) - truth) / samples.std(0) * len(samples) ** 0.5


@pytest.mark.parametrize(("kl", "place"), UNBIASED)
def test_the_offered_variants_descend_the_stated_objective(kl, place):
    assert float(z_scores(gradients(kl=kl, place=place), gradient_of(reverse_kl)).abs().max()) < 4.5


@pytest.mark.parametrize(("kl", "place"), [pair for pair in PAIRS if pair not in UNBIASED])
def test_the_other_variants_descend_something_else(kl, place):
    with pytest.raises(ValueError, match=f"kl='{kl}' with place='{place}' has not the gradient"):
        gradients(4, kl=kl, place=place)
    assert float(z_scores(gradients(kl=kl, place=place, allow_biased=True), gradient_of(reverse_kl)).abs().max()) > 20


@pytest.mark.parametrize(("kl", "place"), PAIRS)
def test_what_each_variant_descends(kl, place):
    found = gradients(kl=kl, place=place, allow_biased=True)
    assert float(z_scores(found, gradient_of(PENALTY[kl, place])).abs().max()) < 4.5


@pytest.mark.parametrize(("kl", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_the_value_of_an_estimator_says_nothing_of_its_gradient(kl, unbiased):
    """k1 and k3 have the right mean, k2 has not; only k2 has the right derivative. Read off the loss, whose other part is 0 here."""
    _, log_q, log_p, _ = on_policy(4000)
    groups = zip(*(part.split(1, 1) for part in (log_q.detach(), log_p, torch.zeros_like(log_p))), strict=True)
    values = torch.stack([reinforce(*group, kl=kl, place="loss", allow_biased=True) for group in groups])
    z = float(z_scores(values, reverse_kl(torch.tensor(MU), torch.tensor(LOG_S))))
    assert abs(z) < 4.5 if unbiased else abs(z) > 8


@pytest.mark.parametrize(("n", "b"), [(2, 1), (3, 3), (5, 2)])
def test_it_is_the_gradient_of_vargrad_path_by_path(n, b):
    """N / (N - 1) times it, exactly, on any log-densities; the leave-one-out mean is no part of the gradient."""
    generator = torch.Generator().manual_seed(n)
    log_q, log_p, log_lik = (3 * torch.randn((n, b), generator=generator, dtype=D) for _ in range(3))
    log_q.requires_grad_()
    ours, theirs = (torch.autograd.grad(loss(log_q, log_p, log_lik), log_q)[0] for loss in (reinforce, vargrad))
    torch.testing.assert_close(ours, n / (n - 1) * theirs, rtol=1e-12, atol=1e-14)
    assert float(ours.abs().min()) > 1e-6


def test_rtb_and_trust_pcl_have_its_gradient_on_policy_whatever_their_log_z():
    truth, groups = gradient_of(reverse_kl), 100_000
    for value in (-1.0, 2.0):
        parameters, log_q, log_p, log_lik = on_policy(groups)
        loss = rtb(log_q, log_p, log_lik, torch.full((groups,), value, dtype=D))
        found = torch.stack(torch.autograd.grad(loss * groups, parameters), -1)
        assert float(z_scores(found, truth).abs().max()) < 4.5


def test_leave_one_out_by_hand():
    cost = torch.tensor([[1.0, 0.0], [2.0, 5.0], [6.0, 1.0]], dtype=D)
    expected = torch.tensor([[1 - 4, 0 - 3], [2 - 3.5, 5 - 0.5], [6 - 1.5, 1 - 2.5]], dtype=D)
    torch.testing.assert_close(leave_one_out(cost), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl": "k4"}, "kl must be one of k1, k2, k3, got 'k4'"),
        ({"place": "both"}, "place must be one of reward, loss, got 'both'"),
        ({"kl": "k3"}, "expected kl='k1' with place='reward' or kl='k2' with place='loss', or allow_biased=True"),
    ],
)
def test_bad_arguments_get_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        gradients(3, **options)


def test_one_path_has_no_baseline():
    with pytest.raises(ValueError, match="at least 2 paths per observation, got 1"):
        reinforce(*torch.zeros((3, 1, 5), dtype=D))
