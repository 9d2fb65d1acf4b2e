"""The Laplace guide of a white prior: exact where the misfit is affine, at the mode elsewhere."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from priors import GeneratorPrior
from rtb_inverse import GaussianNoise, InverseProblem, Posterior, Reward, importance, smc
from rtb_inverse.chains import path_log_prob, renoise, rollout
from rtb_inverse.distributions import GaussianStep
from rtb_inverse.laplace import LaplaceGuidance
from rtb_inverse.noise import PoissonNoise

D = torch.float64
W = torch.randn((4, 3), generator=torch.Generator().manual_seed(3), dtype=D)
OFFSET = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=D)
A = torch.tensor([[1.0, 0.5, -0.5, 0.2], [0.0, 1.0, 0.3, -1.0]], dtype=D)
STD = 0.3


def linear(steps: int = 6, **options) -> Posterior:
    prior = GeneratorPrior(lambda z: z @ W.T.to(z) + OFFSET.to(z), 3, steps=steps, dtype=D)
    return Posterior(prior, InverseProblem(A, GaussianNoise(torch.tensor(STD, dtype=D))), width=8, **options)


def bent(noise=None) -> Posterior:
    """A generator that bends, and an operator that does; 6 numbers see 4."""
    V = torch.randn((6, 4), generator=torch.Generator().manual_seed(5), dtype=D)
    prior = GeneratorPrior(lambda z: z @ V.T.to(z) / 2 + 0.3 * torch.sin(z @ V.T.to(z)), 4, steps=20, dtype=D)
    return Posterior(prior, InverseProblem(lambda x: (x / 2).exp(), noise or GaussianNoise(0.1)), width=8)


@pytest.mark.parametrize("beta", [1.0, 0.5])
@torch.no_grad()
def test_exact_for_an_affine_generator(beta, generator):
    """The residual of RTB vanishes with the exact evidence, on paths of any kind."""
    posterior = linear(beta=beta)
    assert isinstance(posterior.guide, LaplaceGuidance)
    y = torch.tensor([[1.5, -1.0], [-4.0, 3.0]], dtype=D)
    covariance = A @ W @ W.T @ A.T + STD**2 / beta * torch.eye(2, dtype=D)
    log_z = MultivariateNormal(A @ OFFSET, covariance).log_prob(y)
    m = 2  # int N(y; a, s^2)^beta over y, for each of the m elements of y
    log_z = log_z + m * (0.5 * (1 - beta) * math.log(2 * math.pi * STD**2) - 0.5 * math.log(beta))
    posterior.references = None
    own = rollout(posterior, 20, y, generator)
    prior_paths = rollout(posterior.prior, 20, y, generator)
    backtracked = renoise(posterior, own.x_0, generator)
    for x in (own.x, prior_paths.x, backtracked, 3 * torch.randn(own.x.shape, generator=generator, dtype=D)):
        paths = type(own)(x, own.times, own.y)
        log_w = path_log_prob(posterior.prior, paths) + posterior.log_likelihood(paths.x_0, y) - path_log_prob(posterior, paths)
        assert float((log_w - log_z).abs().max()) < 1e-8


def test_the_mode_and_the_batch(generator):
    """No slope is left at x*; what is found for a y does not depend on the others, nor on the y asked before."""
    posterior = bent()
    y = posterior.problem.simulate(posterior.decode(posterior.prior.sample(5, generator)), generator)
    guide = posterior.guide
    z = guide.mode(y).requires_grad_()
    slope = torch.autograd.grad(guide.log_posterior(z[None], y).sum(), z)[0]
    z = z.detach()
    assert float(slope.abs().max()) < 0.05  # off by less than so many prior standard deviations, since the curvature is at least 1
    assert bool(
        (guide.log_posterior(z[None], y) > guide.log_posterior(z + 0.1 * torch.randn((50, 5, 4), generator=generator, dtype=D), y)).all()
    )
    torch.testing.assert_close(guide.mode(y[2:3]), z[2:3])
    e, at, error = torch.randn((4, 5, 4), generator=generator, dtype=D), guide.at(None, posterior.times[3]), None
    together = guide(e, y, error, at)
    alone = guide(e[:, 1:2], y[1:2], error, at)
    torch.testing.assert_close(alone.delta, together.delta[:, 1:2])
    torch.testing.assert_close(guide(e, y, error, at).delta, together.delta)


def test_linearise_is_the_jacobian(generator):
    guide = bent().guide
    z, y = torch.randn((3, 4), generator=generator, dtype=D), torch.randn((3, 6), generator=generator, dtype=D)
    r, J = guide.linearise(z, y)
    for i in range(3):
        torch.testing.assert_close(J[i], torch.autograd.functional.jacobian(lambda u, i=i: guide.misfit(u[None], y[i : i + 1])[0], z[i]))
    torch.testing.assert_close(r, guide.misfit(z, y))


def test_the_twist_is_the_evidence_of_the_approximation(generator):
    posterior = linear()
    y, e = torch.randn((2, 2), generator=generator, dtype=D), torch.randn((7, 2, 3), generator=generator, dtype=D)
    at = posterior.guide.at(None, posterior.times[2])
    got = posterior.guide.log_evidence(e, y, at)
    M = A @ W
    law = MultivariateNormal(e @ M.T + A @ OFFSET, float(at) * M @ M.T + STD**2 * torch.eye(2, dtype=D))
    expected = law.log_prob(y)
    torch.testing.assert_close(got - got[:1], expected - expected[:1])


@pytest.mark.parametrize("noise", [GaussianNoise(0.1), PoissonNoise(gain=30.0, background=2.0)], ids=["gaussian", "counts"])
def test_near_the_posterior_of_a_bent_problem(noise, generator):
    """Without training: nearer than the prior, though y allows several modes; and log Z by three ways alike."""
    posterior = bent(noise)
    y = posterior.problem.simulate(posterior.decode(posterior.prior.sample(6, generator)), generator)
    draws = importance(posterior, y, 512, generator)
    plain = importance(Posterior(posterior.prior, posterior.problem, start="prior", width=8), y, 20_000, generator)
    assert float(draws.ess.median()) / 512 > 50 * float(plain.ess.median()) / 20_000
    z = (draws.log_z - plain.log_z) / (draws.log_z_error**2 + plain.log_z_error**2).sqrt()
    assert float(z.abs().max()) < 4.5
    filtered = smc(posterior, y, 512, generator)
    assert float((filtered.log_z - draws.log_z).abs().median()) < 0.2


def test_a_basis_for_each_observation(generator):
    """`GaussianStep` against torch's own."""
    basis = torch.linalg.qr(torch.randn((2, 4, 4), generator=generator, dtype=D))[0][..., :3]
    scale, ratio = torch.rand(4, generator=generator, dtype=D) + 0.5, torch.rand((5, 2, 3), generator=generator, dtype=D) + 0.5
    step = GaussianStep(torch.randn((5, 2, 4), generator=generator, dtype=D), scale, 1, basis, ratio)
    M = torch.eye(4, dtype=D) + torch.einsum("bdm,nbm,bem->nbde", basis, ratio**2 - 1, basis)
    law = MultivariateNormal(step.loc, scale[:, None] * M * scale)
    x = torch.randn((5, 2, 4), generator=generator, dtype=D)
    torch.testing.assert_close(step.log_prob(x), law.log_prob(x))
    torch.testing.assert_close(step.variance, law.variance)
    torch.testing.assert_close(step.times_covariance(x), (law.covariance_matrix @ x[..., None])[..., 0])
    sd = torch.tensor(0.3, dtype=D)
    trace = torch.linalg.inv(law.covariance_matrix).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(step.expected_log_prob(x, sd), law.log_prob(x) - 0.5 * sd**2 * trace)


def test_where_it_does_not_serve(mixture_prior):
    assert not isinstance(Posterior(mixture_prior, InverseProblem(torch.square, GaussianNoise(0.1)), width=8).guide, LaplaceGuidance)
    prior = GeneratorPrior(lambda z: z @ W.T.to(z), 3, dtype=D, steps=3)
    assert Posterior(prior, Reward(lambda x: x.sum(1)), width=8).guide is None
    not_smooth = InverseProblem(lambda x: x.detach().sign(), GaussianNoise(0.1))
    assert Posterior(prior, not_smooth, width=8).guide is None
    wide = GeneratorPrior(lambda z: z.repeat(1, 200), 100, steps=3)
    assert not isinstance(Posterior(wide, InverseProblem(torch.square, GaussianNoise(0.1)), width=8).guide, LaplaceGuidance)
