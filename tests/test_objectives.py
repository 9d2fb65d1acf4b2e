"""Objectives against formulas written out path by path, autograd, and the exact posterior of a mixture."""

import math

import pytest
import torch

from priors import GaussianMixturePrior
from rtb_inverse.chains import Trajectory, path_log_prob, renoise, rollout
from rtb_inverse.diagnostics import effective_sample_size
from rtb_inverse.objectives import conditional_denoising, group_log_z, half_square, residual, rtb, tempered, vargrad, wake_sleep
from rtb_inverse.problems import GaussianNoise, InverseProblem

SHAPES = [(2, 1), (5, 3), (3, 3)]  # (3, 3) and (2, 1): where (B,) against (N,) would go unnoticed


def draws(N: int, B: int, seed: int = 0, size: float = 3.0):
    """log q (needs a gradient), log p, log lik, (N, B) each, and log Z, (B,)."""
    generator = torch.Generator().manual_seed(seed)
    log_q, log_p, log_lik = (size * torch.randn((N, B), generator=generator, dtype=torch.float64) for _ in range(3))
    return log_q.requires_grad_(), log_p, log_lik, torch.randn(B, generator=generator, dtype=torch.float64).requires_grad_()


def value(tensor: torch.Tensor) -> float:
    return float(tensor.detach())


def loops(N: int, B: int):
    return [(n, b) for n in range(N) for b in range(B)]


@pytest.mark.parametrize(("N", "B"), SHAPES)
def test_residual_path_by_path(N, B):
    log_q, log_p, log_lik, log_z = draws(N, B)
    r = residual(log_q, log_p, log_lik, log_z)
    assert r.shape == (N, B)
    for n, b in loops(N, B):
        assert value(r[n, b]) == pytest.approx(value(log_z[b] + log_q[n, b] - log_p[n, b] - log_lik[n, b]), abs=1e-12)


@pytest.mark.parametrize(("N", "B"), SHAPES)
def test_rtb_is_half_the_mean_square_and_so_is_its_gradient(N, B):
    log_q, log_p, log_lik, log_z = draws(N, B)
    loss = rtb(log_q, log_p, log_lik, log_z)
    r = {(n, b): value(log_z[b] + log_q[n, b] - log_p[n, b] - log_lik[n, b]) for n, b in loops(N, B)}
    assert value(loss) == pytest.approx(sum(v**2 for v in r.values()) / (2 * N * B), rel=1e-12)
    by_path, by_observation = torch.autograd.grad(loss, (log_q, log_z))
    for n, b in loops(N, B):
        assert value(by_path[n, b]) == pytest.approx(r[n, b] / (N * B), rel=1e-12)
    for b in range(B):
        assert value(by_observation[b]) == pytest.approx(sum(r[n, b] for n in range(N)) / (N * B), rel=1e-12)


@pytest.mark.parametrize(("N", "B"), SHAPES)
def test_vargrad_is_half_the_variance_within_each_observation(N, B):
    log_q, log_p, log_lik, _ = draws(N, B)
    f = (log_q - log_p - log_lik).detach()
    expected = sum(value(f[:, b].var(correction=0)) for b in range(B)) / (2 * B)
    assert value(vargrad(log_q, log_p, log_lik)) == pytest.approx(expected, rel=1e-12)
    # a constant per observation changes nothing, one over all paths but the first does
    shift = torch.arange(1.0, B + 1, dtype=torch.float64)
    assert value(vargrad(log_q, log_p + shift, log_lik)) == pytest.approx(expected, rel=1e-12)
    assert value(vargrad(log_q, log_p + torch.arange(N)[:, None], log_lik)) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("clip", [None, 2.0])
@pytest.mark.parametrize(("N", "B"), SHAPES)
def test_vargrad_gradient_is_that_of_rtb_at_the_best_log_z(N, B, clip):
    """The best log Z(y) is found here by a numerical search, not by `group_log_z`; without clipping also dL/dlog Z = 0 there."""
    log_q, log_p, log_lik, log_z = draws(N, B)
    ours = torch.autograd.grad(vargrad(log_q, log_p, log_lik, clip), log_q)[0]
    best = log_z.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([best], lr=1.0, max_iter=100, tolerance_grad=1e-14, tolerance_change=1e-16)

    def closure():
        optimizer.zero_grad()
        loss = rtb(log_q.detach(), log_p, log_lik, best)
        loss.backward()
        return loss

    optimizer.step(closure)
    loss = rtb(log_q, log_p, log_lik, best, clip)
    theirs, at_best = torch.autograd.grad(loss, (log_q, best))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    if clip is None:
        assert value(at_best.abs().max()) < 1e-10
        torch.testing.assert_close(group_log_z(log_q, log_p, log_lik), best.detach(), rtol=1e-9, atol=1e-9)
        # the gradient through the group's own mean is zero: differentiating the variance itself gives the same
        f = log_q - log_p - log_lik
        through = torch.autograd.grad((f - f.mean(0)).square().mean() / 2, log_q)[0]
        torch.testing.assert_close(ours, through, rtol=1e-10, atol=1e-12)


def test_group_log_z_is_detached():
    log_q, log_p, log_lik, _ = draws(4, 2)
    assert not group_log_z(log_q, log_p, log_lik).requires_grad


def test_vargrad_needs_two_paths():
    log_q, log_p, log_lik, _ = draws(1, 2)
    with pytest.raises(ValueError, match="at least 2 paths"):
        vargrad(log_q, log_p, log_lik)


@pytest.mark.parametrize("clip", [0.5, 1.0, 4.0])
def test_clip_is_hubers_loss(clip):
    """Path by path: r^2 / 2 inside, clip (|r| - clip / 2) outside, gradient clipped to [-clip, clip]."""
    r = torch.tensor([-30.0, -4.0, -0.7, 0.0, 0.3, 1.0, 7.0, 500.0], dtype=torch.float64).requires_grad_()
    expected = [v * v / 2 if abs(v) <= clip else clip * (abs(v) - clip / 2) for v in r.tolist()]
    loss = half_square(r, clip)
    assert value(loss) == pytest.approx(sum(expected) / len(r), rel=1e-12)
    gradient = torch.autograd.grad(loss, r)[0]
    torch.testing.assert_close(gradient, r.detach().clamp(-clip, clip) / len(r))


@pytest.mark.parametrize("loss", [rtb, vargrad], ids=["rtb", "vargrad"])
def test_clip_is_off_by_default(loss):
    log_q, log_p, log_lik, log_z = draws(4, 3, size=1e4)
    arguments = (log_q, log_p, log_lik) + ((log_z,) if loss is rtb else ())
    free, wide = loss(*arguments), loss(*arguments, clip=1e9)
    assert value(free) == pytest.approx(value(wide), rel=1e-12)  # a bound above every residual is none
    gradient = torch.autograd.grad(free, log_q)[0]
    assert value(gradient.abs().max()) > 100
    clipped = torch.autograd.grad(loss(*arguments, clip=5.0), log_q)[0]
    assert value(clipped.abs().max()) <= 5.0 / log_q.numel() + 1e-12
    assert value(loss(*arguments, clip=5.0)) < value(free) / 10


@pytest.mark.parametrize(("N", "B"), SHAPES)
def test_wake_sleep_gradient_is_the_self_normalised_weights(N, B):
    log_q, log_p, log_lik, _ = draws(N, B)
    log_w = log_p + log_lik - log_q  # depends on log_q: must not be differentiated
    loss = wake_sleep(log_q, log_w)
    gradient = torch.autograd.grad(loss, log_q)[0]
    for b in range(B):
        weights = [math.exp(value(log_w[n, b])) for n in range(N)]
        for n in range(N):
            assert value(gradient[n, b]) == pytest.approx(-weights[n] / sum(weights) / B, rel=1e-10)
    expected = -sum(value(-gradient[n, b]) * value(log_q[n, b]) for n, b in loops(N, B))
    assert value(loss) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("N", "B"), SHAPES)
def test_conditional_denoising_is_the_mean_negative_log_density(N, B):
    log_q, *_ = draws(N, B)
    loss = conditional_denoising(log_q)
    assert value(loss) == pytest.approx(-sum(value(log_q[n, b]) for n, b in loops(N, B)) / (N * B), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, log_q)[0], torch.full((N, B), -1 / (N * B), dtype=torch.float64))


# The exact posterior


def exact_case(paths_from: str):
    """Mixture, its exact posterior for two observations, and paths of one of four origins: log q, log p, log lik, exact log Z."""
    generator = torch.Generator().manual_seed(3)
    prior, noise_std = GaussianMixturePrior.random(3, 4, 0, torch.float64, steps=6), 0.3
    A = torch.randn((2, 3), generator=generator, dtype=torch.float64)
    y = prior.sample(2, generator) @ A.T + noise_std * torch.randn((2, 2), generator=generator, dtype=torch.float64)
    posterior = prior.posterior(A, noise_std, y)
    problem = InverseProblem(A, GaussianNoise(noise_std), shape=prior.shape)
    if paths_from == "posterior":
        paths = rollout(posterior, 5, y, generator)
    elif paths_from == "prior":
        paths = rollout(prior, 5, y, generator)
    elif paths_from == "backtracked":
        paths = Trajectory(renoise(prior, posterior.sample(5, generator), generator), prior.times, y)
    else:
        paths = Trajectory(2 * torch.randn((7, 5, 2, 3), generator=generator, dtype=torch.float64), prior.times, y)
    log_q, log_p = path_log_prob(posterior, paths), path_log_prob(prior, paths)
    return log_q, log_p, problem.log_likelihood(paths.x_0, y), prior.log_evidence(A, noise_std, y)


@pytest.mark.parametrize("paths_from", ["posterior", "prior", "backtracked", "random"])
def test_losses_are_zero_at_the_exact_posterior(paths_from):
    log_q, log_p, log_lik, log_z = exact_case(paths_from)
    assert log_q.shape == log_p.shape == log_lik.shape == (5, 2)
    assert value(residual(log_q, log_p, log_lik, log_z).abs().max()) < 1e-8
    for clip in (None, 1.0):
        assert value(rtb(log_q, log_p, log_lik, log_z, clip)) < 1e-16
        assert value(vargrad(log_q, log_p, log_lik, clip)) < 1e-16
    torch.testing.assert_close(group_log_z(log_q, log_p, log_lik), log_z, rtol=0, atol=1e-8)
    # and nowhere else: with log Z off by 0.1, or another temperature, they are not
    assert value(rtb(log_q, log_p, log_lik, log_z + 0.1)) == pytest.approx(0.005, rel=1e-5)
    assert value(vargrad(log_q, log_p, 0.5 * log_lik)) > 1e-4


def test_wake_sleep_weights_are_uniform_at_the_exact_posterior():
    log_q, log_p, log_lik, _ = exact_case("posterior")
    log_q = log_q.requires_grad_()
    gradient = torch.autograd.grad(wake_sleep(log_q, log_p + log_lik - log_q), log_q)[0]
    torch.testing.assert_close(gradient, torch.full_like(gradient, -1 / log_q.numel()), rtol=0, atol=1e-8)


def test_tempered_weights_keep_their_effective_sample_size():
    """Even, uneven and hopeless ones; each y has its own power."""
    log_w = torch.tensor([0.1, 3.0, 300.0]) * torch.randn((500, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 7
    after = tempered(log_w, 0.1)
    torch.testing.assert_close(effective_sample_size(after), effective_sample_size(log_w).clamp_min(50), rtol=1e-6, atol=0)
    torch.testing.assert_close(after[:, 0], log_w[:, 0], rtol=0, atol=0)
    assert (after.argsort(0) == log_w.argsort(0)).all()
