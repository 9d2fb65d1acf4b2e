"""A generator x = f(z) as the prior: its chain against the exact Gaussian one, linear f against closed forms, bad input."""

import pytest
import torch
from torch import nn

from priors import GaussianPrior, GeneratorPrior
from rtb_inverse import (
    GaussianNoise,
    InverseProblem,
    Posterior,
    Reward,
    evaluate,
    fit,
    importance,
    path_log_prob,
    rollout,
    simulate_observations,
    smc,
)
from rtb_inverse.baselines import dps, hmc

D, X, M, STD = 3, 5, 2, 0.3


def linear_generator(dtype=torch.float64) -> nn.Linear:
    f = nn.Linear(D, X).to(dtype)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        f.weight.copy_(torch.randn((X, D), generator=g, dtype=torch.float64))
        f.bias.copy_(torch.randn((X,), generator=g, dtype=torch.float64))
    return f


def linear_case(steps=20, dtype=torch.float64):
    """A prior, a problem, and A f's matrix and offset."""
    prior = GeneratorPrior(linear_generator(dtype), D, steps=steps)
    A = torch.randn((M, X), generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(dtype)
    return prior, InverseProblem(A, GaussianNoise(STD)), (A @ prior.generator.weight).detach(), (A @ prior.generator.bias).detach()


def exact(prior, steps=None) -> GaussianPrior:
    return GaussianPrior(torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64), steps=steps or prior.steps)


def test_the_chain_is_the_exact_one_of_standard_normal_noise(generator):
    prior = GeneratorPrior(linear_generator(), D, steps=7)
    other = exact(prior)
    path = rollout(prior, 50, None, generator)
    torch.testing.assert_close(path_log_prob(prior, path), path_log_prob(other, path))
    t = prior.times[:-1]
    torch.testing.assert_close(prior.denoiser_error(t), other.denoiser_error(t))


def test_x_is_f_of_z(generator):
    prior = GeneratorPrior(nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.Unflatten(1, (2, 2, 2))), (2, 3), steps=2)
    z = torch.randn((4, 5, 2, 3), generator=generator)
    assert prior.decodes and prior.data_shape == (2, 2, 2)
    torch.testing.assert_close(prior.decode(z)[1, 2], prior.generator(z[1, 2][None])[0])
    assert not any(p.requires_grad for p in prior.parameters()) and not prior.train().training


def test_evidence_of_a_linear_generator(generator):
    """The guided start is exact: all weights are Z. From the prior within 4 standard errors for each of 6 observations: a false alarm in 1
    of 2,600 runs. (There the weights are uneven, and the mean of a thousand is not yet normal.)"""
    prior, problem, matrix, offset = linear_case()
    posterior = Posterior(prior, problem, start="prior", width=16)
    y = simulate_observations(posterior, 6, generator).y
    truth = exact(prior).log_evidence(matrix, STD, y - offset)
    draws = importance(posterior, y, 20_000, generator)
    assert float(((draws.log_z - truth) / draws.log_z_error).abs().max()) < 4
    guided = importance(Posterior(prior, problem, width=16), y, 100, generator)
    assert float((guided.log_w - truth).abs().max()) < 1e-6


def test_corrected_draws_of_a_linear_generator(generator):
    """Their mean in x, within 4.5 standard errors for 20 numbers: a false alarm in 1 of 7,000 runs."""
    prior, problem, matrix, offset = linear_case()
    posterior = Posterior(prior, problem, width=16)
    y = simulate_observations(posterior, 4, generator).y
    run = importance(posterior, y, 1000, generator)
    expected = prior.decode(exact(prior).posterior(matrix, STD, y - offset).mean)
    error = ((run.weights[..., None] * (run.x - run.mean)) ** 2).sum(0).sqrt()
    assert float(((run.mean - expected) / error).abs().max()) < 4.5
    assert smc(posterior, y, 64, generator).x.shape == (64, 4, X)


def test_training_closes_most_of_the_gap(generator):
    """A bent generator, started at the prior: after 150 steps the bounds of log Z are less than half as far apart."""
    prior = GeneratorPrior(lambda z: torch.cat([z, (z**2)[..., :1]], -1), 2, steps=10)
    posterior = Posterior(prior, InverseProblem(torch.eye(3)[1:], GaussianNoise(0.3)), start="prior", width=64)
    held = simulate_observations(posterior, 64, generator)

    def gap():
        found = evaluate(posterior, held, 64, torch.Generator().manual_seed(1)).numbers
        return found["eubo"].value - found["elbo"].value

    before = gap()
    fit(posterior, 150, seed=0, progress=False, bounds=0, lr=5e-3, warm_start=1.0)
    assert gap() < before / 2


def test_a_saved_posterior_asks_for_its_generator(tmp_path, generator):
    prior, problem, _, _ = linear_case(steps=4)
    posterior = Posterior(prior, problem, width=16)
    posterior.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no prior; pass prior="):
        Posterior.from_pretrained(tmp_path)
    again = Posterior.from_pretrained(tmp_path, prior=linear_case(steps=4)[0], problem=linear_case()[1])
    y = simulate_observations(posterior, 2, generator).y
    path = rollout(posterior, 3, y, generator)
    torch.testing.assert_close(path_log_prob(again, path), path_log_prob(posterior, path), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("generator", "shape", "error", "message"),
    [
        (3, 2, TypeError, "generator must be callable, got int"),
        (nn.Linear(3, 4), 2, ValueError, r"generator must take z of shape \(M, 2\), got RuntimeError"),
        (lambda z: z.sum(0), 2, ValueError, r"generator must keep the batch, \(M, \*data_shape\) for M z's, got \(2,\) for 2 of them"),
        (lambda z: z[:1], 2, ValueError, r"generator must keep the batch, .* got \(1, 2\)"),
        (lambda z: (z, z), 2, TypeError, "generator must return a tensor .* got tuple"),
        (lambda z: z[:, 5], 2, ValueError, r"generator must take z of shape \(M, 2\), got IndexError"),
        (lambda z: z * torch.inf, 2, ValueError, "generator must return finite values"),
        (lambda z, f=nn.Linear(2, 4): f(z), 2, ValueError, "generator must be frozen"),
        (nn.Linear(3, 4), 0, ValueError, "shape must be"),
        (lambda z: z - z.mean(0), 2, ValueError, "generator must see each z by itself, .* call eval"),
        (lambda z, f=nn.BatchNorm1d(2, affine=False): f(z), 2, ValueError, "generator must take any number of z, got ValueError of"),
    ],
)
def test_bad_generators(generator, shape, error, message):
    with pytest.raises(error, match=message):
        GeneratorPrior(generator, shape)


def test_a_generator_without_gradient(generator):
    """Guidance is left out, or asked for in vain; what needs a gradient says so."""
    prior = GeneratorPrior(lambda z: torch.from_numpy(z.detach().numpy() ** 3), 2, steps=4)
    assert not prior.differentiable and GeneratorPrior(lambda z: z**3, 2, steps=4).differentiable
    problem = InverseProblem(torch.square, GaussianNoise(0.3))
    posterior = Posterior(prior, problem, width=8)
    assert posterior.guide is None and posterior.references is not None  # its draws are exact, and cheap
    y = simulate_observations(posterior, 2, generator).y
    assert bool(torch.isfinite(importance(posterior, y, 16, generator).log_w).all())
    reward = Reward(lambda x: x.sum(1))
    with pytest.raises(ValueError, match=r"start='guided' needs a differentiable operator \(and decode\)"):
        Posterior(prior, reward, start="guided", width=8)
    for method in (dps, hmc):
        with pytest.raises(ValueError, match=f"prior must have a differentiable decode for {method.__name__}"):
            method(prior, problem, y, 2)
