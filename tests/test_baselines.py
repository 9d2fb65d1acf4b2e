"""Rival samplers against exact posteriors, closed forms and hand-written loops.

Statistical checks are z-scores, |z| < 4.5 in each of a few (a correct method fails one once in 150,000 seeds)."""

from itertools import pairwise

import pytest
import torch

from priors import GaussianMixturePrior
from rtb_inverse import GaussianNoise, InverseProblem, Prior, Reward, VarianceExploding
from rtb_inverse.baselines import dps, fps_smc, tuned_zeta, twisted
from rtb_inverse.baselines.dps import residual_step
from rtb_inverse.corrections import resample
from rtb_inverse.diagnostics import Estimate, crps, interval_level, psnr
from rtb_inverse.distributions import draw
from rtb_inverse.evaluation import judge, scores
from rtb_inverse.particles import Particles

D = torch.float64
MATRIX, NOISE = torch.tensor([[1.0, -0.5]], dtype=D), 0.5


def mixture(components: int = 1, steps: int = 6, **options) -> GaussianMixturePrior:
    """Correlated components whose means are about a standard deviation apart."""
    generator = torch.Generator().manual_seed(0)
    means, roots = (torch.randn((components, 2, k), generator=generator, dtype=D) for k in (1, 2))
    covariances = 0.25 * roots @ roots.mT + 0.3 * torch.eye(2, dtype=D)
    return GaussianMixturePrior(torch.ones(components, dtype=D), means[..., 0], covariances, steps=steps, **options)


def linear(noise_std=NOISE) -> InverseProblem:
    return InverseProblem(MATRIX, GaussianNoise(noise_std))


def z(samples, truth) -> float:
    samples = samples.double()
    return float((samples.mean() - truth) / samples.std() * samples.numel() ** 0.5)


class LaplaceNoise(torch.nn.Module):
    """y = A(x) + n, n of density exp(-|n|) / 2; of the interface of `GaussianNoise`."""

    def sample(self, clean, generator=None):
        uniform = torch.rand(clean.shape, generator=generator, dtype=clean.dtype) - 0.5
        return clean - uniform.sign() * torch.log1p(-2 * uniform.abs())

    def log_prob(self, clean, y, event_dim):
        log_density = -(y - clean).abs() - torch.tensor(2.0, dtype=clean.dtype).log()
        return log_density.reshape(*log_density.shape[: log_density.ndim - event_dim], -1).sum(-1)


# DPS


def curved(x):
    """Not linear, and y is a table: (M, 2) to (M, 2, 3)."""
    return torch.stack([x.tanh(), x**2, x.flip(-1) * x], -1)


PROBLEMS = {
    "linear": lambda: linear(),
    "curved": lambda: InverseProblem(curved, GaussianNoise(0.3)),
    "laplace": lambda: InverseProblem(MATRIX, LaplaceNoise()),
    "levels": lambda: InverseProblem(curved, GaussianNoise(torch.tensor([0.1, 0.5, 2.0], dtype=D))),
}


def observations(problem: InverseProblem, b: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return problem.simulate(torch.randn((b, 2), generator=generator, dtype=D), generator)


def move_by_hand(prior, problem, x_t, t, y, zeta, kind):
    """Of one draw x_t (2,) and one y (*y_shape), by central differences in place of autograd."""

    def objective(x):
        x_0 = prior.denoise(x[None], t)
        if kind == "laplace":
            return problem.noise.log_prob(problem(x_0)[0], y, y.ndim)
        levels = {"levels": torch.tensor([0.1, 0.5, 2.0], dtype=D) / 0.8666666666666667}.get(kind, torch.ones((), dtype=D))
        return ((y - problem(x_0)[0]) / levels).square().sum().sqrt()

    h = 1e-6
    slopes = torch.stack([(objective(x_t + h * e) - objective(x_t - h * e)) / (2 * h) for e in torch.eye(2, dtype=D)])
    return zeta * slopes if kind == "laplace" else -2 * zeta * slopes


@pytest.mark.parametrize("kind", PROBLEMS)
def test_dps_is_the_hand_written_loop(kind):
    """Draw by draw and observation by observation, from the same random numbers."""
    prior, problem, zeta = mixture(3, steps=3), PROBLEMS[kind](), 0.2
    problem.bind((2,))
    y = observations(problem)
    particles = dps(prior, problem, y, 4, torch.Generator().manual_seed(1), zeta=zeta)

    generator = torch.Generator().manual_seed(1)
    x = draw(prior.initial((4, 2)), generator)
    for t, s in pairwise(prior.times):
        unguided = draw(prior.transition(x, t, s), generator)
        moves = [[move_by_hand(prior, problem, x[i, b], t, y[b], zeta, kind) for b in range(2)] for i in range(4)]
        x = unguided + torch.stack([torch.stack(row) for row in moves])
    torch.testing.assert_close(particles.x, x, rtol=1e-6, atol=1e-6)
    assert float((x - unguided).abs().min()) > 1e-4
    assert torch.equal(particles.log_w, torch.zeros((4, 2), dtype=D))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_dps_in_parts_is_dps(batch_size, make_prior):
    prior = make_prior("unet2d", steps=2)
    problem = InverseProblem(torch.nn.Flatten(), GaussianNoise(0.5))
    y = torch.randn((2, 64), generator=torch.Generator().manual_seed(0))
    whole, parts = (dps(prior, problem, y, 4, torch.Generator().manual_seed(1), batch_size=size).x for size in (None, batch_size))
    assert whole.shape == (4, 2, 1, 8, 8)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)


def test_dps_bounds_the_states_in_one_call(monkeypatch):
    prior, seen = mixture(), []
    prior.denoiser_error(prior.times)  # measured once
    denoise = prior.denoise
    monkeypatch.setattr(prior, "denoise", lambda x, t: seen.append(len(x)) or denoise(x, t))
    dps(prior, linear(), torch.ones((2, 1), dtype=D), 7, torch.Generator().manual_seed(0), batch_size=3)
    assert seen == [3, 3, 1] * prior.steps


def residual(x, y) -> torch.Tensor:
    return (y - x @ MATRIX.T).abs().mean((0, 2))


def test_dps_residual_falls_below_that_of_the_prior_and_with_zeta():
    prior = mixture(3, steps=20)
    y = torch.full((200, 1), 3.0, dtype=D)
    unguided = prior.sample(64, torch.Generator().manual_seed(0))[:, None].expand(64, 200, 2)
    weak, strong = (dps(prior, linear(), y, 64, torch.Generator().manual_seed(1), zeta=zeta).x for zeta in (0.03, 0.1))
    assert z(residual(weak, y) - residual(unguided, y), 0.0) < -8
    assert z(residual(strong, y) - residual(weak, y), 0.0) < -8


def test_dps_at_the_observation_itself_stays_finite():
    problem = InverseProblem(lambda x: 0 * x, GaussianNoise(1.0), shape=(2,))
    x_t = torch.randn((3, 1, 2), generator=torch.Generator().manual_seed(0), dtype=D)
    _, move = residual_step(mixture(), problem, x_t, mixture().times[0], torch.zeros((1, 2), dtype=D), 1.0)
    assert torch.equal(move, torch.zeros_like(move))


def test_dps_climbs_a_reward():
    reward = Reward(lambda x: 2 * x[:, 0])
    prior = mixture(3, steps=20)
    climbed = dps(prior, reward, None, 4000, torch.Generator().manual_seed(0), zeta=0.05).x[:, 0, 0]
    unguided = prior.sample(4000, torch.Generator().manual_seed(1))[:, 0]
    assert climbed.shape == (4000,)
    assert z(climbed - unguided, 0.0) > 8


# The twisted diffusion sampler


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize(("threshold", "spread"), [(0.0, 1.0), (0.9, 1.0), (0.9, 3.0)])
def test_twisted_evidence_is_unbiased(components, threshold, spread, generator):
    """Z-hat / Z averages to one over 2,000 runs with 16 particles."""
    prior = mixture(components, steps=12)
    y = torch.full((2000, 1), 0.7, dtype=D)
    log_z = twisted(prior, linear(), y, 16, generator, threshold=threshold, spread=spread).log_z
    ratio = (log_z - prior.log_evidence(MATRIX, NOISE, y[0])).exp()
    assert abs(z(ratio, 1.0)) < 4.5
    assert 0.01 < float(ratio.std()) < 1.0


@pytest.mark.parametrize("components", [1, 3])
def test_twisted_particles_are_of_the_posterior(components, generator):
    prior, b = mixture(components, steps=12), 60
    y = torch.full((b, 1), 0.7, dtype=D)
    exact = prior.posterior(MATRIX, NOISE, y[:1]).distribution
    particles = twisted(prior, linear(), y, 400, generator)
    for j in range(2):
        assert abs(z(particles.mean[:, j], float(exact.mean[0, j]))) < 4.5
        second = torch.einsum("nb,nb->b", particles.weights, (particles.x[..., j] - exact.mean[0, j]) ** 2)
        assert abs(z(second, float(exact.variance[0, j]))) < 4.5


def test_behind_a_magnifying_operator_the_twist_is_flattened_by_its_gain():
    """Of gain 10: by r_t^2 alone its steps overshoot, and what is left of the particles is far from y."""
    prior, problem, y = mixture(1, steps=12), InverseProblem(8.9 * MATRIX, GaussianNoise(NOISE)), torch.full((40, 1), 7.0, dtype=D)
    exact = prior.log_evidence(8.9 * MATRIX, NOISE, y[0])
    off = [(twisted(prior, problem, y, 64, torch.Generator().manual_seed(0), spread=s).log_z - exact).abs().mean() for s in (1.0, 99.0)]
    assert off[0] > 100 and off[1] < 1


def test_the_gradient_of_the_twist_helps():
    """Against proposals that are not moved, which without resampling are draws of the prior: the weights vary less."""
    prior, y = mixture(1, steps=12), torch.full((20, 1), 4.0, dtype=D)
    problem = linear()
    moved = twisted(prior, problem, y, 1000, torch.Generator().manual_seed(0), threshold=0.0).ess
    plain = GaussianMixturePrior.sample(prior, 20_000, torch.Generator().manual_seed(0)).reshape(1000, 20, 2)
    log_w = problem.log_likelihood(plain, y)
    unmoved = 1 / (log_w.softmax(0) ** 2).sum(0)
    assert z(moved - unmoved, 0.0) > 8


# All of them


@pytest.mark.parametrize("kind", ["mixture", "gaussian", "unet2d", "unet1d"])
@pytest.mark.parametrize("method", [dps, fps_smc, twisted])
def test_every_prior_runs_and_seeds_repeat(method, kind, make_prior):
    prior = make_prior(kind, steps=2)
    rows = torch.linspace(-1, 1, 3 * prior.shape.numel(), dtype=D).reshape(3, -1)
    problem = InverseProblem(lambda x: x.flatten(1) @ rows.T.to(x.dtype), GaussianNoise(0.5))
    y = torch.tensor([[0.5, -0.5, 0.1], [1.0, 2.0, 0.0]])
    one, two = (method(prior, problem, y, 3, torch.Generator().manual_seed(1)) for _ in range(2))
    assert one.x.shape == (3, 2, *prior.shape) and one.log_w.shape == (3, 2)
    assert one.x.dtype == one.log_w.dtype == prior._options()["dtype"]
    assert torch.isfinite(one.x).all() and torch.isfinite(one.log_w).all()
    assert torch.equal(one.x, two.x) and torch.equal(one.log_w, two.log_w)
    assert float(one.x.std(0).min()) > 0 and not one.x.requires_grad


@pytest.mark.parametrize("method", [dps, fps_smc, twisted])
def test_other_schedules_run(method, schedule):
    particles = method(mixture(2, schedule=schedule), linear(), torch.ones((2, 1), dtype=D), 4, torch.Generator().manual_seed(0))
    assert torch.isfinite(particles.x).all() and torch.isfinite(particles.log_w).all()


class Stretched(Prior):
    """x = 2 z + 1 for z ~ N(0, I) with its exact denoiser: a prior with a decoder."""

    def __init__(self):
        super().__init__((2,), VarianceExploding(0.05, 20.0), 12)
        self.register_buffer("zero", torch.zeros(1, dtype=D))

    def denoise(self, x_t, t):
        return x_t / (1 + self.schedule.alpha_sigma(t)[1] ** 2)

    def denoiser_error(self, t):
        variance = self.schedule.alpha_sigma(t)[1] ** 2
        return (variance / (1 + variance))[..., None].expand(*t.shape, 2)

    def decode(self, x_0):
        return 2 * x_0 + 1


def test_a_decoder_is_inside_the_likelihood(generator):
    """The evidence and the posterior of x = 2 z + 1 in data space; the prior's Gaussian steps are exact here."""
    prior, truth = Stretched(), GaussianMixturePrior(torch.ones(1), torch.ones((1, 2), dtype=D), 4 * torch.eye(2, dtype=D)[None])
    y = torch.full((2000, 1), 2.0, dtype=D)
    particles = twisted(prior, linear(), y, 16, generator)
    assert abs(z((particles.log_z - truth.log_evidence(MATRIX, NOISE, y[0])).exp(), 1.0)) < 4.5


def test_dps_through_a_decoder_is_dps_on_the_operator_behind_it():
    class Plain(Stretched):
        decode = Prior.decode

    behind = InverseProblem(lambda z: (2 * z + 1) @ MATRIX.T.to(z.dtype), GaussianNoise(NOISE))
    y = torch.tensor([[2.0], [-1.0]], dtype=D)
    ours = dps(Stretched(), linear(), y, 5, torch.Generator().manual_seed(0), zeta=0.1).x
    theirs = dps(Plain(), behind, y, 5, torch.Generator().manual_seed(0), zeta=0.1).x
    torch.testing.assert_close(ours, 2 * theirs + 1)


def test_resampling_keeps_the_mean_weight_and_touches_only_the_poor():
    log_w = torch.tensor([[0.0, 5.0], [0.1, -5.0], [0.2, -5.0], [0.1, -5.0]], dtype=D)
    x = torch.arange(8.0, dtype=D).reshape(4, 2)
    (picked,), weights, log_z = resample((x,), log_w, torch.tensor([1.0, 2.0], dtype=D), 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(picked[:, 0], x[:, 0]) and torch.equal(weights[:, 0], log_w[:, 0]) and float(log_z[0]) == 1.0
    assert (picked[:, 1] == 1.0).all() and (weights[:, 1] == 0.0).all()
    assert float(log_z[1]) == pytest.approx(
        2.0 + float((torch.tensor(5.0).exp() + 3 * torch.tensor(-5.0).exp()).log()) - 1.3862943611, abs=1e-6
    )


def nonlinear() -> InverseProblem:
    return InverseProblem(lambda x: x.square(), GaussianNoise(0.5))


def flat() -> InverseProblem:
    return InverseProblem(lambda x: x.detach().round(), GaussianNoise(0.5))


@pytest.mark.parametrize(
    ("method", "problem", "options", "message"),
    [
        (dps, linear, {"n": 0}, "n must be an integer of at least 1, got 0"),
        (dps, linear, {"zeta": -1.0}, "zeta must be a finite number above 0, got -1.0"),
        (dps, linear, {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        (dps, linear, {"y": torch.ones(3)}, r"y must have shape \(B, 1\), got \(3,\)"),
        (dps, flat, {"y": torch.ones(1, 2)}, "problem must have a differentiable operator for dps"),
        (dps, nonlinear, {"y": torch.ones(1, 2), "zeta": 1e200}, r"states of dps at zeta = 1e\+200 must be finite"),
        (twisted, linear, {"n": 1}, "n must be an integer of at least 2, got 1"),
        (twisted, linear, {"threshold": 1.5}, r"threshold must be in \[0, 1\], got 1.5"),
        (twisted, linear, {"spread": 0.0}, "spread must be a finite number above 0, got 0.0"),
        (twisted, flat, {"y": torch.ones(1, 2)}, "problem must have a differentiable operator for twisted"),
        (fps_smc, linear, {"n": 1}, "n must be an integer of at least 2, got 1"),
        (fps_smc, linear, {"threshold": -0.1}, r"threshold must be in \[0, 1\], got -0.1"),
        (fps_smc, nonlinear, {"y": torch.ones(1, 2)}, "problem must have an affine operator for fps_smc"),
        (fps_smc, PROBLEMS["laplace"], {}, "problem must have Gaussian noise for fps_smc, got LaplaceNoise"),
    ],
)
def test_bad_arguments_get_one_clear_error(method, problem, options, message):
    with pytest.raises(ValueError, match=message):
        method(**{"prior": mixture(), "problem": problem(), "y": torch.ones((1, 1), dtype=D), "n": 4, **options})


@pytest.mark.parametrize("method", [dps, fps_smc, twisted])
def test_priors_and_problems_are_told_apart(method):
    with pytest.raises(TypeError, match="prior must be a Prior, got InverseProblem"):
        method(linear(), mixture(), torch.ones(1, 1))
    with pytest.raises(TypeError, match="problem must be an InverseProblem, got Linear"):
        method(mixture(), torch.nn.Linear(2, 1), torch.ones(1, 1))


def test_the_tuned_zeta_is_the_nearest_of_those_that_do_not_diverge(generator):
    prior, problem = mixture(2), linear()
    x = prior.sample(3, generator)
    y = problem.simulate(x, generator)

    def off(zeta):
        return float(crps(dps(prior, problem, y, 8, torch.Generator().manual_seed(1), zeta=zeta).x, x).mean())

    assert off(0.3) < off(10.0) / 2
    for zetas in ((0.3, 10.0), (10.0, 0.3), (1e300, 0.3)):
        assert tuned_zeta(prior, problem, x, y, zetas, 8, generator) == 0.3
    with pytest.raises(ValueError, match="setting must be given that does not diverge, got zeta = 1e\\+300"):
        tuned_zeta(prior, problem, x, y, [1e300], 8, generator)


def test_judged_draws_are_resampled_and_scored(generator):
    prior, problem = mixture(2), linear().bind((2,))
    truth = prior.sample(3, generator)
    y = problem.simulate(truth, generator)
    draws = Particles(prior.sample(60, generator).reshape(20, 3, 2), torch.randn((20, 3), generator=generator, dtype=D))
    x, line = judge(problem, lambda: draws, y, truth, torch.Generator().manual_seed(1))
    assert f"log_z {Estimate.of(draws.log_z)}" in line
    assert "log_z" not in judge(problem, lambda: Particles(draws.x, torch.zeros((20, 3))), y, truth)[1]  # draws without weights tell none
    assert torch.equal(x, draws.resample(generator=torch.Generator().manual_seed(1)).x)
    raw, said = judge(problem, lambda: draws, y, truth, proposal=True)
    assert torch.equal(raw, draws.x) and f"elbo {Estimate.of(draws.log_w.mean(0))}, log_z {Estimate.of(draws.log_z)}" in said
    found = scores(problem, x, y, truth)
    torch.testing.assert_close(found["psnr"], psnr(x.mean(0), truth))
    torch.testing.assert_close(found["chi_squared"], ((y - x @ MATRIX.T) / NOISE).square().mean((0, 2)))
    torch.testing.assert_close(found["log_likelihood_of_truth"], problem.log_likelihood(truth, y))
    assert "ssim" not in found and scores(problem, x, y).keys() == {"log_likelihood", "chi_squared"}
    assert line.startswith(f"psnr {Estimate.of(found['psnr'])}, crps {Estimate.of(found['crps'])}, chi_squared ")
    assert f"coverage_90 {Estimate.of(found['coverage_90'])} ({interval_level(20, 0.9):.3f}), " in line
