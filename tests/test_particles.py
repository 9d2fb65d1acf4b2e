"""Weighted draws: their weights, moments, evidence and resampling."""

import pytest
import torch

from rtb_inverse.particles import Particles


@pytest.fixture
def particles(generator):
    return Particles(torch.randn((40, 2, 3), generator=generator), 2 * torch.randn((40, 2), generator=generator) + 700)


def test_log_z_of_equal_weights_is_their_logarithm():
    assert Particles(torch.zeros(300, 1, 2), torch.ones((300, 1), dtype=torch.float64)).log_z.item() == pytest.approx(1.0, abs=1e-13)


def test_weights_are_normalised_and_moments_are_weighted(particles):
    w = (particles.log_w - particles.log_w.max(0).values).double().exp()
    w = w / w.sum(0)
    torch.testing.assert_close(particles.weights.double(), w, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(particles.ess.double(), w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-4, atol=0)
    for b in range(2):
        mean = sum(w[n, b] * particles.x[n, b].double() for n in range(40))
        variance = sum(w[n, b] * (particles.x[n, b].double() - mean) ** 2 for n in range(40))
        torch.testing.assert_close(particles.mean[b].double(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(particles.std[b].double(), variance.sqrt(), rtol=1e-4, atol=1e-5)


def test_ess_is_between_one_and_n():
    x = torch.zeros(5, 3, 1)
    log_w = torch.tensor([[0.0] * 5, [0.0] + [-1e4] * 4, [0.0, 0.0] + [-1e4] * 3]).T
    particles = Particles(x, log_w)
    torch.testing.assert_close(particles.ess, torch.tensor([5.0, 1.0, 2.0]))
    assert repr(particles) == "Particles(5 draws of shape (1,) for each of 3 observations, ESS 2.7)"


def test_log_z_and_its_error_are_those_of_a_known_integral(assert_mean):
    """Weights N(x; 0, 1) / N(x; 0, 2): log Z = 0; the error is the spread over repetitions."""
    generator = torch.Generator().manual_seed(0)
    broad, target = torch.distributions.Normal(0, 2.0), torch.distributions.Normal(0, 1.0)
    x = 2 * torch.randn((400, 1000, 1), generator=generator, dtype=torch.float64)  # N = 400 draws, 1,000 repetitions
    draws = Particles(x, (target.log_prob(x) - broad.log_prob(x))[..., 0])
    assert_mean(draws.log_z.exp(), 1.0)
    assert float(draws.log_z_error.mean() / draws.log_z.std()) == pytest.approx(1, abs=0.1)
    torch.testing.assert_close(draws.log_z, draws.log_w.exp().mean(0).log())


@pytest.mark.parametrize("n", [7, 40, 501])
def test_resampling_is_systematic(n, particles, assert_mean):
    """Every particle is drawn floor or ceil of n w times, and n w times in the mean."""
    labelled = Particles(torch.arange(40.0)[:, None, None].expand(40, 2, 1), particles.log_w)
    expected = n * labelled.weights.double()
    counts = []
    for seed in range(200):
        drawn = labelled.resample(n, torch.Generator().manual_seed(seed))
        assert drawn.x.shape == (n, 2, 1) and torch.equal(drawn.log_w, torch.zeros(n, 2))
        counts.append(torch.stack([torch.bincount(drawn.x[:, b, 0].long(), minlength=40) for b in range(2)], 1).double())
        assert float((counts[-1] - expected).abs().max()) < 1 + 1e-4
    counts = torch.stack(counts)
    varies = counts.std(0) > 0
    assert_mean(counts[:, varies], expected[varies])


def test_resampling_keeps_to_its_own_observation_and_shuffles(particles):
    marked = Particles(particles.x * 0 + torch.tensor([10.0, 20.0])[:, None], particles.log_w)
    assert torch.equal(marked.resample(9, torch.Generator().manual_seed(0)).x[..., 0], torch.tensor([10.0, 20.0]).expand(9, 2))
    labelled = Particles(torch.arange(40.0)[:, None, None].expand(40, 2, 1), torch.zeros(40, 2))
    order = labelled.resample(generator=torch.Generator().manual_seed(0)).x[..., 0]
    assert torch.equal(order.sort(0).values, torch.arange(40.0)[:, None].expand(40, 2))
    assert not torch.equal(order[:, 0], order[:, 1]) and not (order.diff(dim=0) > 0).all()
