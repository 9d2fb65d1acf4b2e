"""The problems whose posterior is known, against torch's densities, long importance sampling from the prior, and finer grids.

Monte-Carlo comparisons fail at 4.5 standard errors: a right one does so once in 150,000, this file makes fewer than 200."""

import functools

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from priors import GaussianMixturePrior
from rtb_inverse.guidance import affine
from rtb_inverse.posterior import Posterior
from tasks import exact_problem
from tasks.exact import EXACT_PROBLEMS, LinearProblem, PlaneProblem, gaussian_blur

D = torch.float64
LINEAR = ("gmm2", "gmm10", "gmm40", "gmm100", "gp_inpainting", "gp_blur")
PLANE = ("abs2", "nonlinear2", "poisson2")


@functools.cache
def on_grid(name, cells=None):
    """A problem, its grid and the prior's density on it made once; all of them have the same prior."""
    exact = exact_problem(name)
    exact.cells = cells or exact.cells
    first = exact if name == PLANE[0] else on_grid(PLANE[0], cells)
    exact.grid, exact.log_prior = first.grid, first.log_prior
    return exact


def simulated(exact, b, generator):
    return exact.problem.simulate(exact.prior.sample(b, generator), generator)


@pytest.mark.parametrize("name", EXACT_PROBLEMS)
def test_every_problem_draws_and_knows_its_evidence(name, generator):
    exact, again = exact_problem(name, steps=3), exact_problem(name, steps=3)
    if name in PLANE:
        exact.log_prior = again.log_prior = on_grid(name).log_prior  # made once
    y = simulated(exact, 2, generator)
    assert isinstance(exact, LinearProblem if name in LINEAR else PlaneProblem) and exact.prior.steps == 3
    assert exact.problem.shape == exact.prior.shape
    one, two = (problem.draws(y, 5, torch.Generator().manual_seed(1)) for problem in (exact, again))
    assert one.shape == (5, 2, *exact.prior.shape) and one.dtype == y.dtype == torch.float32
    assert torch.equal(one, two) and torch.equal(exact.log_evidence(y), again.log_evidence(y))
    assert exact.log_evidence(y).shape == (2,) and torch.isfinite(exact.log_evidence(y)).all()


def test_the_published_problems_are_as_they_were():
    """Mixture and matrix of the tables in benchmarks/."""
    for d, m in ((2, 1), (10, 2), (40, 2)):
        exact = exact_problem(f"gmm{d}")
        A = torch.randn((m, d), generator=torch.Generator().manual_seed(1)) / d**0.5
        assert torch.equal(exact.problem.operator.matrix, A) and float(exact.problem.noise.std) == 0.5
        assert torch.equal(exact.prior.means, GaussianMixturePrior.random(d).means) and exact.prior.steps == 40


def mixture_of_y(exact):
    """p(y) by torch, from the covariance matrices themselves."""
    A, _ = affine(exact.problem)
    A, R, prior = A.double(), torch.eye(len(A), dtype=D) * exact.problem.noise.std**2, exact.prior
    if not isinstance(prior, GaussianMixturePrior):
        return MultivariateNormal(A @ prior.mean.double().flatten(), A @ prior.covariance @ A.T + R)
    components = MultivariateNormal(prior.means.double() @ A.T, A @ prior.covariances.double() @ A.T + R)
    return MixtureSameFamily(Categorical(logits=prior.log_weights.double()), components)


@pytest.mark.parametrize("name", LINEAR)
def test_linear_evidence_is_torchs_density_of_y(name, generator):
    exact = exact_problem(name)
    y = simulated(exact, 5, generator)
    torch.testing.assert_close(exact.log_evidence(y).double(), mixture_of_y(exact).log_prob(y.double()), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", ["gp_inpainting", "gp_blur"])
def test_draws_of_a_process_have_numpys_moments(name, generator, assert_mean):
    """Their mean, and their variance along eight random directions (a mean of 256 elements and eight squares for one y)."""
    exact, n = exact_problem(name), 4000
    y = simulated(exact, 1, generator)
    A, C = affine(exact.problem)[0].double().numpy(), exact.prior.covariance.numpy()
    precision = np.linalg.inv(C) + A.T @ A / 0.01
    mean = torch.as_tensor(np.linalg.solve(precision, A.T @ y[0].flatten().double().numpy() / 0.01))
    x = exact.draws(y, n, generator)[:, 0].flatten(1).double()
    rows = torch.randn((8, 256), generator=generator, dtype=D)
    variance = torch.as_tensor(np.linalg.inv(precision))
    along = (x - mean) @ rows.T
    assert_mean(along, 0.0)
    assert_mean(along**2, ((rows @ variance) * rows).sum(1))
    assert float(((x.mean(0) - mean) / (variance.diagonal() / n).sqrt()).abs().max()) < 5  # 256 at once


@pytest.mark.parametrize("name", ["gmm2", *PLANE])
def test_evidence_and_draws_against_importance_sampling_from_the_prior(name, generator, assert_mean):
    """Z(y) = E p(y | x) over 300,000 draws of the prior, and the posterior's moments as weighted ones."""
    exact, n = on_grid(name) if name in PLANE else exact_problem(name), 20_000
    y, x = simulated(exact, 3, generator).double(), exact.prior.sample(300_000, generator).double()
    weights = (exact.problem.log_likelihood(x[:, None], y) - exact.log_evidence(y)).exp()
    assert_mean(weights, 1.0)
    draws = exact.draws(y, n, generator).double()
    for f in (lambda x: x, lambda x: x**2, lambda x: x.prod(-1, keepdim=True), torch.cos):
        ours, theirs = f(draws), f(x)[:, None] * weights[..., None]
        mean = ours.mean(0)
        theirs = theirs - mean * weights[..., None]  # of mean 0, where E f is `mean`
        error = (ours.var(0) / n + theirs.var(0) / len(x)).sqrt()
        assert float((theirs.mean(0) / error).abs().max()) < 4.5


@pytest.mark.parametrize("name", PLANE)
def test_a_finer_grid_changes_nothing(name, generator):
    """Half the cell: less than 1e-4 in the log evidence; and the prior's mass on the grid is 1."""
    exact = on_grid(name)
    y = simulated(exact, 4, generator).double()
    assert abs(float(exact.log_prior.exp().sum()) * exact.side**2 - 1) < 1e-6
    assert float((on_grid(name, 2 * exact.cells).log_evidence(y) - exact.log_evidence(y)).abs().max()) < 1e-4
    assert float((on_grid(name, 16).log_evidence(y) - exact.log_evidence(y)).abs().max()) > 1e-3


def test_grid_against_linear_algebra(generator):
    """The same linear problem both ways."""
    exact = exact_problem("gmm2")
    y = simulated(exact, 6, generator).double()
    plane = PlaneProblem(exact.prior, exact.problem)
    plane.log_prior = on_grid("abs2").log_prior
    torch.testing.assert_close(plane.log_evidence(y), mixture_of_y(exact).log_prob(y), rtol=0, atol=1e-6)


def test_the_nonlinear_posterior_is_bent_and_the_absolute_one_has_modes_of_either_sign(generator):
    x = on_grid("nonlinear2").draws(torch.tensor([[5.0]]), 4000, generator)[:, 0]
    assert float((x[:, 1] + x[:, 0] ** 2 / 4 - 5).abs().mean()) < 0.5  # on the parabola, from one side to the other
    assert float((x[:, 0] > 2).float().mean()) > 0.02 and float((x[:, 0] < -2).float().mean()) > 0.02
    x = on_grid("abs2").draws(torch.tensor([[4.0, 4.0]]), 4000, generator)[:, 0]
    assert len(x.sign().unique(dim=0)) > 1


def test_blur_is_scipys():
    image = torch.rand((12, 12), generator=torch.Generator().manual_seed(0), dtype=D)
    blurred = (gaussian_blur(12, 1.5).double() @ image.flatten()).reshape(12, 12)
    options = {"sigma": 1.5, "mode": "constant", "truncate": 20.0}
    theirs = gaussian_filter(image.numpy(), **options) / gaussian_filter(np.ones((12, 12)), **options)
    np.testing.assert_allclose(blurred.numpy(), theirs, atol=1e-6)


def test_a_posterior_takes_them(generator):
    """A problem with its prior is what `Posterior` asks for."""
    exact = exact_problem("gp_inpainting", steps=2)
    posterior = Posterior(exact.prior, exact.problem, width=8)
    y = simulated(exact, 2, generator)
    assert posterior.sample(y, 3, generator).x.shape == (3, 2, 1, 16, 16)


@pytest.mark.parametrize("call, message", [
    (lambda: exact_problem("gmm3"), "name must be one of gmm2, gmm10, .* poisson2, got 'gmm3'"),
    (lambda: exact_problem("gmm2", steps=0), "steps must be an integer of at least 1"),
    (lambda: exact_problem("gmm10").log_evidence(torch.zeros(3)), r"y must have shape \(B, 2\), got \(3,\)"),
    (lambda: exact_problem("gp_blur").draws(torch.zeros(1, 5), 2), r"y must have shape \(B, 256\), got \(1, 5\)"),
    (lambda: exact_problem("abs2").draws(torch.zeros(1, 3), 2), r"y must have shape \(B, 2\), got \(1, 3\)"),
    (lambda: exact_problem("poisson2").log_evidence(torch.full((1, 2), float("nan"))), "y must be finite"),
    (lambda: PlaneProblem(exact_problem("abs2").prior, exact_problem("abs2").problem, cells=0).side, "cells must be an integer"),
])  # fmt: skip
def test_bad_arguments_get_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()
