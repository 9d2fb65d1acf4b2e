"""deepinv's samplers on our priors, against exact posteriors. They are biased: what is asked of each is the direction, and by how much
of the way from the prior's mean to the posterior's it errs, on priors far outside [0, 1] and [-1, 1]."""

import sys

import pytest
import torch

from priors import GaussianMixturePrior
from rtb_inverse import GaussianNoise, InverseProblem, Reward
from rtb_inverse.baselines import deepinv_sampler
from rtb_inverse.baselines import deepinv_samplers as module
from rtb_inverse.baselines.deepinv_samplers import TUNING, Denoiser, DrawsFrom, Measurement
from rtb_inverse.schedules import FlowMatching, VarianceExploding, VariancePreserving
from tasks import Inpainting

pytest.importorskip("deepinv")

D = torch.float64
MATRIX = torch.tensor([[1.0, -0.5]], dtype=D)
NAMES = tuple(TUNING)
SHIFT, SCALE = 20.0, 5.0


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(shift=SHIFT, scale=SCALE, steps=60, **options) -> GaussianMixturePrior:
    """One correlated component around 20, of standard deviation about 5: nothing of it lies in [-1, 1]."""
    covariance = torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=D)
    mean = torch.tensor([[1.0, -0.5]], dtype=D)
    return GaussianMixturePrior(torch.ones(1, dtype=D), shift + scale * mean, scale**2 * covariance[None], steps=steps, **options)


def far_modes(steps=60) -> GaussianMixturePrior:
    means = torch.tensor([[10.0, 10.0], [-10.0, -10.0]], dtype=D)
    return GaussianMixturePrior(torch.ones(2, dtype=D), means, torch.eye(2, dtype=D).expand(2, 2, 2), steps=steps)


def linear(noise_std=2.5, matrix=MATRIX) -> InverseProblem:
    return InverseProblem(matrix, GaussianNoise(noise_std))


def miss(particles, prior, posterior) -> float:
    """|mean of the draws - posterior mean| / |prior mean - posterior mean|."""
    truth = posterior.distribution.mean
    return float((particles.x.mean((0, 1)) - truth).norm() / (prior.distribution.mean - truth).norm())


# Against exact posteriors


@pytest.mark.parametrize(("name", "most"), [("dps", 0.5), ("pigdm", 0.2), ("moment_matching", 0.1), ("diffpir", 0.5), ("ddrm", 0.3)])
@pytest.mark.parametrize(("shift", "scale"), [(SHIFT, SCALE), (0.0, 1.0), (-3.0, 0.2)])
def test_a_gaussian_in_any_range(name, most, shift, scale):
    """y is 2 standard deviations from what the prior expects. The methods' own biases, found here in all three ranges: dps 0.38 to 0.42,
    pigdm 0.13 to 0.16, moment_matching 0.01 to 0.04, diffpir 0.41 to 0.44, ddrm 0.16 to 0.24, with an error of about 0.03 from 1,000 draws;
    the prior's mean has 1."""
    prior, noise_std = gaussian(shift, scale), 0.5 * scale
    y = (MATRIX @ prior.means[0] - 2.0 * scale)[None]
    posterior = prior.posterior(MATRIX, noise_std, y[0])
    particles = deepinv_sampler(name, prior, linear(noise_std), y, 1000, seeded())
    assert miss(particles, prior, posterior) < most
    spread = particles.x.std((0, 1)) / posterior.distribution.variance.sqrt()
    assert 0.6 < float(spread.min()) and float(spread.max()) < 1.4


@pytest.mark.parametrize("name", NAMES)
def test_the_mode_that_y_asks_for(name):
    """Modes at (10, 10) and (-10, -10); a sampler that clamps to [-1, 1] reaches neither."""
    prior, matrix = far_modes(), torch.tensor([[1.0, 0.3]], dtype=D)
    y = torch.tensor([[14.0], [-14.0]], dtype=D)
    x = deepinv_sampler(name, prior, linear(1.0, matrix), y, 200, seeded()).x
    right = (x.sum(-1) * y[:, 0]) > 0
    assert float(right.double().mean()) > 0.8  # dps: 0.9; the others: all
    truth = prior.posterior(matrix, 1.0, y[0]).distribution.mean
    ours = x[:, 0][right[:, 0]]
    near = ours[(ours - truth).norm(dim=-1) < 6]
    assert len(near) > 0.7 * 200
    assert float((near.mean(0) - truth).norm()) < 0.75


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gain", [1.0, 7.0])
def test_almost_noiseless_and_all_seen_is_y(name, gain):
    """Whatever the norm of the operator."""
    prior, noise_std = gaussian(), 0.05
    x = torch.tensor([[23.0, 14.0], [30.0, 20.0]], dtype=D)
    particles = deepinv_sampler(name, prior, linear(gain * noise_std, gain * torch.eye(2, dtype=D)), gain * x, 50, seeded())
    assert float((particles.x - x).abs().mean()) < 3 * noise_std


def expected_mean(name: str, prior, y, noise_std: float) -> torch.Tensor:
    """Of the last state, in the prior's own units. With one Gaussian component all is linear, and means follow the same steps as draws."""
    m, C, A, eye = prior.means[0], prior.covariances[0], MATRIX, torch.eye(2, dtype=D)
    S2, G2 = float(C.diagonal().mean()), float((MATRIX**2).sum())
    levels = Denoiser(prior, prior.times).levels.tolist()
    x = m
    for s, s_next in zip(levels, [*levels[1:], 0.0], strict=True):
        J = C @ torch.linalg.inv(C + s**2 * eye)
        x_0 = m + J @ (x - m)
        within = {
            "dps": s**2 * G2 * torch.ones((1, 1), dtype=D),
            "pigdm": S2 * s**2 / (S2 + s**2) * A @ A.T,
            "moment_matching": s**2 * A @ J @ A.T,
        }[name]
        pull = J.T @ A.T @ torch.linalg.inv(within + noise_std**2 * torch.eye(1, dtype=D)) @ (y - A @ x_0)
        x = x + (1 - (s_next / s) ** 2) * (x_0 - x + s**2 * pull)
    return x


@pytest.mark.parametrize("name", ["dps", "pigdm", "moment_matching"])
@pytest.mark.parametrize(("shift", "scale"), [(SHIFT, SCALE), (-3.0, 0.2)])
def test_the_papers_steps_in_the_priors_own_units(name, shift, scale, assert_mean):
    """A hand-written loop that knows of no other units. The standard deviation S is measured there, to some per cent, and moves the means
    by less than the tenth of a standard error."""
    prior, noise_std = gaussian(shift, scale, steps=20), 0.5 * scale
    y = MATRIX @ prior.means[0] - 2.0 * scale
    x = deepinv_sampler(name, prior, linear(noise_std), y[None], 1000, seeded()).x[:, 0]
    assert_mean(x, expected_mean(name, prior, y, noise_std))


@pytest.mark.parametrize("name", NAMES)
def test_other_units_give_the_same_draws(name):
    """From the same random numbers, where the schedule scales along: x near 300 is 300 + 40 times x near 0."""

    def draws(shift, scale):
        schedule = VarianceExploding(0.01 * scale, 500.0 * scale, prediction_type="sample")
        prior = gaussian(shift, scale, steps=30, schedule=schedule)
        y = (MATRIX @ prior.means[0] - 2.0 * scale)[None]
        return (deepinv_sampler(name, prior, linear(0.5 * scale), y, 20, seeded()).x - shift) / scale

    torch.testing.assert_close(draws(300.0, 40.0), draws(0.0, 1.0), rtol=1e-2, atol=1e-2)


def test_moment_matching_of_a_gaussian_tends_to_the_exact_posterior(assert_mean):
    """Its p(y | x_t) is exact there, so what is left is the step size."""
    prior, y = gaussian(steps=200), torch.tensor([[12.0]], dtype=D)
    truth = prior.posterior(MATRIX, 2.5, y[0]).distribution
    x = deepinv_sampler("moment_matching", prior, linear(), y, 1000, seeded()).x[:, 0]
    assert_mean(x, truth.mean)
    torch.testing.assert_close(x.std(0), truth.variance.sqrt(), rtol=0.1, atol=0)


def test_ddrm_without_data_has_the_noise_of_its_levels():
    """An element that y does not see: with the noise of the paper, eta = 1 is ancestral sampling of its law, given the other."""
    prior = GaussianMixturePrior(torch.ones(1, dtype=D), torch.full((1, 2), 20.0, dtype=D), 25 * torch.eye(2, dtype=D)[None], steps=200)
    problem = Inpainting((2,), torch.tensor([True, False]), 1.0)
    x = deepinv_sampler("ddrm", prior, problem, torch.tensor([[22.0]], dtype=D), 2000, seeded(), eta=0.85).x[:, 0, 1]
    assert abs(float(x.mean()) - 20) < 0.6
    assert 4.0 < float(x.std()) < 5.5  # 3.3 with noise over sqrt(2)


# The denoiser


@pytest.mark.parametrize("kind", ["vp", "discrete", "flow"])
def test_the_denoiser_is_the_priors(kind):
    schedule = {"vp": None, "discrete": VariancePreserving(prediction_type="sample"), "flow": FlowMatching(shift=2.0)}[kind]
    prior = gaussian(schedule=schedule, steps=9)
    denoiser = Denoiser(prior, prior.times)
    x = SHIFT + 30 * torch.randn((5, 1, 1, 2), generator=seeded(), dtype=D)
    for t in prior.times[1:-1]:
        alpha, sigma = prior.schedule.alpha_sigma(t)
        level = sigma / alpha
        ours = denoiser.centre + denoiser.scale * denoiser((x - denoiser.centre) / denoiser.scale, (level / denoiser.scale).float())
        units = (x - denoiser.centre) / denoiser.scale
        theirs = prior.denoise((alpha * (denoiser.centre + denoiser.scale * units))[:, 0, 0], t)
        assert denoiser.time(float(level.float())) == float(t)
        torch.testing.assert_close(ours[:, 0, 0], theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("schedule", [None, FlowMatching(), VariancePreserving(prediction_type="sample")])
def test_between_the_levels_and_with_a_level_for_each(schedule):
    prior = gaussian(schedule=schedule, steps=9)
    denoiser = Denoiser(prior, prior.times)
    levels = torch.tensor([0.0123, 0.77, 3.21, 54.3], dtype=D)
    t = torch.tensor([denoiser.time(float(level)) for level in levels], dtype=D)
    torch.testing.assert_close(denoiser.level(t), levels, rtol=1e-9, atol=0)
    x = torch.randn((4, 1, 1, 2), generator=seeded(), dtype=D)
    each = [denoiser(x[i : i + 1], float(level)) for i, level in enumerate(levels / denoiser.scale)]
    torch.testing.assert_close(denoiser(x, levels / denoiser.scale), torch.cat(each), rtol=1e-12, atol=1e-12)


def test_the_units_are_the_priors():
    denoiser = Denoiser(gaussian(), gaussian().times)
    torch.testing.assert_close(denoiser.mean.flatten(), gaussian().means[0], rtol=0.01, atol=0)
    assert abs(denoiser.spread / (SCALE * 0.9**0.5) - 1) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_the_denoiser_is_called_on_the_schedule(name, monkeypatch):
    """At the very times of the prior's grid, in order (the first stands in for pure noise); DiffPIR at a choice of its own."""
    prior, times = gaussian(steps=9), []
    denoise = prior.denoise
    monkeypatch.setattr(prior, "denoise", lambda x, t: times.append(float(t.flatten()[0])) or denoise(x, t))
    deepinv_sampler(name, prior, linear(), torch.tensor([[12.0]], dtype=D), 3, seeded())
    seen = times[-9:]
    if name == "diffpir":
        assert seen == sorted(seen, reverse=True) and all(t == int(t) for t in seen[1:])
    else:
        assert seen[1:] == prior.times[1:-1].tolist()
    assert 998 < seen[0] < 999


def test_ddrm_uses_data_noisier_than_the_prior():
    """deepinv takes them for unseen where the noise is above 1 in its units."""
    prior = gaussian()
    low, high = (deepinv_sampler("ddrm", prior, linear(20.0), torch.tensor([[y]], dtype=D), 50, seeded()).x for y in (0.0, 60.0))
    assert float((high - low)[..., 0].min()) > 0.1


# The measurement


def offset_operator(x):
    return x.flatten(1) @ torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=x.dtype).T + 4.0


PROBLEMS = {
    "matrix": lambda: InverseProblem(torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], dtype=D), GaussianNoise(0.3)),
    "tall": lambda: InverseProblem(torch.randn((5, 3), generator=seeded(), dtype=D), GaussianNoise(0.3)),
    "offset": lambda: InverseProblem(offset_operator, GaussianNoise(torch.tensor([0.2, 0.7], dtype=D))),
    "mask": lambda: Inpainting((3,), torch.tensor([True, False, True]), 0.4),
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", PROBLEMS)
def test_the_measurement_in_other_units(kind, large, monkeypatch):
    """A' and y' say of x' what A and y say of x: equal residuals over the noise, a unit norm, and a true adjoint."""
    import deepinv

    if large:
        monkeypatch.setattr(module, "decomposes", lambda problem: False)
    prior = GaussianMixturePrior.random(3, 2, dtype=D, steps=5)
    problem = PROBLEMS[kind]().bind((3,))
    denoiser = Denoiser(prior, prior.times)
    denoiser.centre, denoiser.scale = denoiser.mean - 40.0, 17.0
    x, y = (torch.randn((4, *shape), generator=seeded(), dtype=D) for shape in (problem.shape, problem.y_shape))
    forward = Measurement.of(prior, problem, deepinv)
    y_, physics = forward.observed(deepinv, denoiser, y[:, None, None])
    x_ = (x[:, None, None] - denoiser.centre) / denoiser.scale
    residual = (y_ - physics.A(x_)) / physics.noise_model.sigma
    torch.testing.assert_close(residual[:, 0, 0], (y - problem(x)) / problem.noise.std.to(D), rtol=1e-5, atol=1e-5)
    dense = torch.cat([physics.A(e.reshape(1, 1, 1, 3)).flatten(1) for e in torch.eye(3, dtype=D)]).T
    assert abs(float(torch.linalg.matrix_norm(dense, 2)) - 1) < (0.05 if large else 1e-9)
    torch.testing.assert_close(physics.A_adjoint(y_)[:, 0, 0], y_[:, 0, 0] @ dense)


@pytest.mark.parametrize("name", ["pigdm", "moment_matching", "diffpir"])
def test_a_large_operator_is_a_small_one(name, monkeypatch):
    """Without the singular value decomposition: adjoint by autograd, inner systems solved iteratively."""
    prior, y = gaussian(steps=10), torch.tensor([[12.0], [20.0]], dtype=D)
    small = deepinv_sampler(name, prior, linear(), y, 3, seeded()).x
    monkeypatch.setattr(module, "decomposes", lambda problem: False)
    torch.testing.assert_close(deepinv_sampler(name, prior, linear(), y, 3, seeded()).x, small, rtol=0.02, atol=0.05)


# The contract


@pytest.mark.parametrize("name", NAMES)
def test_seeds_shapes_and_what_is_left_alone(name):
    prior, y = gaussian(steps=5), torch.tensor([[12.0], [20.0], [9.0]], dtype=D)
    before, state = y.clone(), torch.get_rng_state()
    first, again, other = (deepinv_sampler(name, prior, linear(), y, 4, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(y, before) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.x, again.x) and not torch.equal(first.x, other.x)
    assert first.x.shape == (4, 3, 2) and first.x.dtype == D
    assert torch.equal(first.log_w, torch.zeros((4, 3), dtype=D))
    assert first.info["evaluations"] == 5
    assert deepinv_sampler(name, prior, linear(), y, 5, seeded(), steps=7, batch_size=2).info["evaluations"] == 7
    assert len({float(v) for v in first.x.flatten()}) == 24  # no two draws alike


@pytest.mark.parametrize("name", NAMES)
def test_images_in_single_precision(name, make_prior):
    prior = make_prior("unet2d", steps=3)
    problem = Inpainting(prior.shape, "box", 0.1)
    y = problem.simulate(torch.randn((2, *prior.data_shape), generator=seeded()), seeded())
    particles = deepinv_sampler(name, prior, problem, y, 2, seeded())
    assert particles.x.shape == (2, 2, 1, 8, 8) and particles.x.dtype == torch.float32


def test_dps_takes_operators_that_are_not_linear_and_decoders():
    class Stretched(GaussianMixturePrior):
        def decode(self, x_0):
            return x_0.sinh()

    problem = InverseProblem(lambda x: x.tanh(), GaussianNoise(0.1))
    prior = Stretched(torch.ones(1, dtype=D), torch.zeros((1, 2), dtype=D), torch.eye(2, dtype=D)[None], steps=60)
    y = torch.tensor([[0.7, -0.5]], dtype=D)
    x = deepinv_sampler("dps", prior, problem, y, 200, seeded()).x
    assert float((x.tanh() - y).mean((0, 1)).abs().max()) < 0.1


def test_the_noise_is_of_the_generator():
    with DrawsFrom(seeded(), 3.0):
        ours = torch.randn_like(torch.empty(4, dtype=D))
    torch.testing.assert_close(ours, 3 * torch.randn(4, generator=seeded(), dtype=D))


class LaplaceNoise(torch.nn.Module):
    def sample(self, clean, generator=None):
        return clean

    def log_prob(self, clean, y, event_dim):
        return -(y - clean).abs().sum(-1)


class Decoding(GaussianMixturePrior):
    def decode(self, x_0):
        return 2 * x_0


Y = torch.zeros((1, 1), dtype=D)
BAD = {
    "name must be one of dps, pigdm": lambda: deepinv_sampler("dds", gaussian(), linear(), Y),
    "n must be an integer of at least 1": lambda: deepinv_sampler("dps", gaussian(), linear(), Y, 0),
    "steps must be an integer of at least 2": lambda: deepinv_sampler("dps", gaussian(), linear(), Y, steps=1),
    "tuning parameter of pigdm must be one of weight, eta, got 'zeta'": lambda: deepinv_sampler("pigdm", gaussian(), linear(), Y, zeta=1.0),
    "guidance must be one of annealed, norm": lambda: deepinv_sampler("dps", gaussian(), linear(), Y, guidance="none"),
    "weight must be a finite number above 0": lambda: deepinv_sampler("dps", gaussian(), linear(), Y, weight=-1.0),
    r"zeta must be in \[0, 1\]": lambda: deepinv_sampler("diffpir", gaussian(), linear(), Y, zeta=2.0),
    "problem must have Gaussian noise for ddrm, got LaplaceNoise": lambda: deepinv_sampler(
        "ddrm", gaussian(), InverseProblem(MATRIX, LaplaceNoise()), Y
    ),
    "problem must have Gaussian noise for dps, got Identity": lambda: deepinv_sampler("dps", gaussian(), Reward(lambda x: x.sum(-1)), None),
    "problem must have an affine operator for pigdm": lambda: deepinv_sampler(
        "pigdm", gaussian(), InverseProblem(lambda x: x.tanh(), GaussianNoise(1.0)), torch.zeros((1, 2), dtype=D)
    ),
    "prior must live in data space for diffpir": lambda: deepinv_sampler(
        "diffpir", Decoding(torch.ones(1, dtype=D), torch.zeros((1, 2), dtype=D), torch.eye(2, dtype=D)[None]), linear(), Y
    ),
    r"y must have shape \(B, 1\)": lambda: deepinv_sampler("dps", gaussian(), linear(), torch.zeros((1, 2), dtype=D)),
}


@pytest.mark.parametrize("message", BAD)
def test_one_clear_error(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()


def test_ddrm_wants_a_small_operator(monkeypatch):
    monkeypatch.setattr(module, "DENSE_LIMIT", 1)
    with pytest.raises(ValueError, match="problem must have a mask, or a matrix of at most 1 elements, for ddrm"):
        deepinv_sampler("ddrm", gaussian(), linear(), Y)


def test_without_deepinv_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepinv", None)
    with pytest.raises(ImportError, match="deepinv_sampler needs deepinv"):
        deepinv_sampler("dps", gaussian(), linear(), Y)
