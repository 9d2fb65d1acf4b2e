"""What a posterior of one y finds in closed form: a linear map added to its estimates."""

import copy
from types import SimpleNamespace

import pytest
import torch

from priors import DiffusersPrior, GaussianPrior
from rtb_inverse import GaussianNoise, InverseProblem, Posterior, fit, importance, networks
from rtb_inverse.chains import path_log_prob, rollout
from rtb_inverse.lightning import PosteriorTraining
from rtb_inverse.training import RIDGES, fit_head, principal, regress
from tasks import PhaseRetrieval

D = torch.float64


def spoilt(generator, gate=0.8):
    """A Gaussian posterior whose guide moves the estimates too little: by an affine function of x_t."""
    prior = GaussianPrior(torch.zeros(4), torch.diag(torch.tensor([1.0, 0.5, 2.0, 0.3])), steps=6)
    prior = prior.to(D)
    problem = InverseProblem(torch.randn((2, 4), generator=generator, dtype=D), GaussianNoise(0.5))
    posterior = Posterior(prior, problem, width=8)
    y = problem.simulate(prior.sample(1, generator), generator)
    exact = importance(posterior, y, 2, generator).log_z
    with torch.no_grad():
        posterior.gate.fill_(gate)
        posterior.gate[0] = 1  # the last step is left alone
    return posterior, y, exact


def test_a_linear_error_is_found(generator):
    posterior, y, exact = spoilt(generator)
    gap = (exact - importance(posterior, y, 512, generator).log_w.mean(0)).item()
    posterior.hold_head()
    fit_head(posterior, y, 4096, generator)
    left = (exact - importance(posterior, y, 512, generator).log_w.mean(0)).item()
    assert gap > 0.1 and abs(left) < 0.1 * gap


def test_principal_directions_are_those_of_the_weighted_covariance(generator):
    x, weights = torch.randn((40, 5), generator=generator, dtype=D) * torch.arange(1.0, 6.0), torch.rand(40, generator=generator, dtype=D)
    basis = principal(x, weights / weights.sum(), 2)
    covariance = torch.cov(x.T, aweights=weights, correction=0)
    torch.testing.assert_close(basis @ basis.T @ covariance, covariance @ basis @ basis.T)
    torch.testing.assert_close(torch.diag(basis.T @ covariance @ basis), torch.linalg.eigvalsh(covariance).flip(0)[:2])
    assert principal(x[:2], weights[:2] / weights[:2].sum(), 4).shape == (5, 4)


def test_a_large_x_is_corrected_within_its_principal_directions(monkeypatch, generator):
    """Three of four: less of the gap is left, the paths keep their densities, and nothing moves outside of the directions."""
    monkeypatch.setattr(networks, "RANK", 3)
    posterior, y, exact = spoilt(generator)
    gap = (exact - importance(posterior, y, 512, generator).log_w.mean(0)).item()
    head = posterior.hold_head()
    fit_head(posterior, y, 4096, generator)
    left = (exact - importance(posterior, y, 512, generator).log_w.mean(0)).item()
    assert head.basis.shape == (4, 3) and left < 0.8 * gap
    torch.testing.assert_close(head.basis.T @ head.basis, torch.eye(3, dtype=D))
    paths = rollout(posterior, 4, y, generator)
    torch.testing.assert_close(path_log_prob(posterior, paths), paths.log_prob)
    t, estimate = posterior.times[2], torch.zeros(7, 1, 4, dtype=D)
    moved = head(paths.x[2, :1].expand(7, 1, 4), t, posterior.step_index(t), estimate) - estimate
    torch.testing.assert_close(moved @ head.basis @ head.basis.T, moved)


def test_nothing_is_learnt_of_noise(generator):
    known, error = (torch.randn((60, n), generator=generator, dtype=D) for n in (20, 3))
    half = torch.arange(60) % 2 == 0
    assert not regress(known, error, half).any()
    true, square = torch.randn((20, 3), generator=generator, dtype=D), known.T @ known
    expected = torch.linalg.solve(square + 60 * RIDGES[0] * torch.eye(20, dtype=D), square @ true)
    torch.testing.assert_close(regress(known, known @ true, half), expected)


def test_a_head_of_zeros_changes_nothing(generator):
    posterior, y, _ = spoilt(generator)
    paths = rollout(posterior, 4, y, generator)
    posterior.hold_head()
    assert torch.equal(path_log_prob(posterior, paths), path_log_prob(posterior, paths, 1))
    torch.testing.assert_close(path_log_prob(posterior, paths), paths.log_prob)


def test_fit_to_one_y_raises_its_elbo_and_the_paths_keep_their_densities(tmp_path, generator):
    """A paired test on the same noise, at 4 standard errors (10 were seen)."""
    prior = DiffusersPrior.from_pretrained("priors/digits", steps=6)
    posterior = Posterior(prior, PhaseRetrieval(prior.shape))
    y = posterior.problem.simulate(prior.sample(1, generator), generator)
    own = fit(copy.deepcopy(posterior), 1, y=y, progress=False, head_draws=256, bounds=0)
    before, after = (importance(each, y, 128, torch.Generator().manual_seed(5)).log_w[:, 0] for each in (posterior, own))
    gain = after - before
    assert float(gain.mean() / gain.std()) * 128**0.5 > 4 and bool(own.head.weight[1:].any()) and not own.head.weight[0].any()

    paths = rollout(own, 3, y, generator)
    for chunk in (None, 1, 7):
        torch.testing.assert_close(path_log_prob(own, paths, chunk), paths.log_prob, rtol=1e-4, atol=2e-2)
    own.save_pretrained(tmp_path)
    loaded = Posterior.from_pretrained(tmp_path)
    module = PosteriorTraining(loaded)
    module._trainer = SimpleNamespace(precision="32-true")
    module.setup("test")
    assert torch.equal(path_log_prob(loaded, paths), path_log_prob(own, paths))
    assert fit(own, 1, progress=False, pool=16, pool_start=16, slots=4, states=4, bounds=0, line_search=False).head is None


@pytest.mark.parametrize("options", [{"head_draws": 0}, {}])
def test_no_head_where_it_is_not_asked_for_or_the_guide_is_exact(options, generator):
    posterior, y, _ = spoilt(generator, gate=1.0)
    assert fit(posterior, 1, y=y, progress=False, **options).head is None
