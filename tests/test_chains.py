"""A transition is a distribution: what it draws is what it scores. Paths, their densities, and the climb back up."""

import itertools
import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal

from rtb_inverse.chains import (
    VARIANCES,
    Prior,
    Trajectory,
    initial_log_prob,
    path_log_prob,
    random_steps,
    renoise,
    rollout,
    step_log_prob,
    step_shares,
)  # fmt: skip
from rtb_inverse.distributions import GaussianStep, draw
from rtb_inverse.guidance import Update
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem
from rtb_inverse.schedules import FlowMatching, VariancePreserving, expand

M = 4000
KINDS = ("mixture", "gaussian", "unet2d", "unet1d")
EXACT = ("mixture", "gaussian")  # whose steps are the exact reversal


def covariance_factor(d, generator):
    """A random covariance V diag V^T with variances in [0.5, 1.5]."""
    V = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    return (V * (0.5 + torch.rand(d, generator=generator, dtype=torch.float64))) @ V.T


def check_agreement(dist, generator, assert_mean):
    """Draws of a distribution have its own mean and standard deviation, and its density is theirs: for an independent normalised
    density p' close by, the mean of p'(x) / q(x) over draws of q is 1."""
    x = dist.sample((M,), generator=generator).double()
    assert x.shape == (M, *dist.batch_shape, *dist.event_shape)
    assert_mean(x, dist.mean.double())
    assert_mean((x - dist.mean) ** 2, dist.stddev.double() ** 2)
    log_q = dist.log_prob(x.to(dist.mean.dtype)).double()
    assert log_q.shape == (M, *dist.batch_shape)
    for shift, stretch in ((0.05, 0.97), (-0.05, 0.95)):
        near = Independent(Normal(dist.mean.double() + shift * dist.stddev, stretch**0.5 * dist.stddev.double()), len(dist.event_shape))
        assert_mean((near.log_prob(x) - log_q).exp(), 1.0)
    return x, log_q


@pytest.fixture
def states(generator):
    """states(chain, k, n, b): times and states as a chain meets them at its step k, from prior-like x_0."""

    def make(chain, k, n=2, b=3):
        dtype = chain._options()["dtype"]
        t, s = chain.times[k], chain.times[k + 1]
        x_0 = torch.randn((n, b, *chain.shape), generator=generator, dtype=dtype)
        return chain.schedule.add_noise(x_0, torch.randn(x_0.shape, generator=generator, dtype=dtype), t), t, s

    return make


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("kind", ("unet2d", "unet1d"))
@pytest.mark.parametrize("step", [0, 2, 3])
def test_gaussian_transitions_draw_what_they_score(kind, variance, step, schedule, make_prior, states, generator, assert_mean):
    chain = make_prior(kind, schedule, variance=variance)
    x_t, t, s = states(chain, step, 1, 2)
    with torch.no_grad():
        dist = chain.transition(x_t, t, s)
    x, log_q = check_agreement(dist, generator, assert_mean)
    entropy = (dist.stddev.double().log() + 0.5 * math.log(2 * math.pi * math.e)).flatten(2).sum(-1)
    assert_mean(-log_q, entropy)
    truth = MultivariateNormal(dist.mean.flatten(2).double(), torch.diag_embed(dist.variance.flatten(2).double()))
    torch.testing.assert_close(log_q[:9], truth.log_prob(x[:9].flatten(3)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("step", [0, 2, 3])
def test_exact_transitions_draw_what_they_score(step, kind, schedule, make_prior, states, generator, assert_mean):
    chain = make_prior(kind, schedule)
    x_t, t, s = states(chain, step)
    dist = chain.transition(x_t, t, s)
    x = dist.sample((M,), generator=generator)
    assert_mean(x, dist.mean)
    assert_mean((x - dist.mean) ** 2, dist.variance)
    # the density integrates to one under a broad Gaussian proposal: an importance estimate of 1
    broad = Independent(Normal(dist.mean, (1.5 * dist.variance).sqrt()), len(chain.shape))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        z = broad.sample((4 * M,))
    assert_mean((dist.log_prob(z) - broad.log_prob(z)).exp(), 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_initial_draws_what_it_scores(kind, schedule, make_prior, generator, assert_mean):
    chain = make_prior(kind, schedule)
    dist = chain.initial((2, 3))
    assert dist.batch_shape == (2, 3) and dist.event_shape == chain.shape
    x = dist.sample((M,), generator=generator)
    assert_mean(x, dist.mean)
    assert_mean((x - dist.mean) ** 2, dist.variance)
    if kind not in EXACT:
        alpha, sigma = (float(c) for c in schedule.alpha_sigma(chain.times[0]))
        truth = Independent(Normal(torch.zeros(chain.shape), (alpha**2 + sigma**2) ** 0.5), len(chain.shape))
        torch.testing.assert_close(dist.log_prob(x[:3]), truth.log_prob(x[:3]))


def test_a_leading_grid_starts_from_unit_noise_as_diffusers_does(make_prior):
    """Its first time is far from the last: alpha is 0.35 there, and N(0, sigma^2) would be too narrow."""
    schedule = VariancePreserving(beta_schedule="squaredcos_cap_v2", timestep_spacing="leading", prediction_type="v_prediction")
    chain = make_prior("unet2d", schedule)
    assert float(schedule.alpha_sigma(chain.times[0])[0]) > 0.3
    torch.testing.assert_close(chain.initial((1,)).stddev, torch.ones((1, *chain.shape)))


@pytest.mark.parametrize("kind", ("mixture", "unet2d"))
@pytest.mark.parametrize("step", [0, 3])
def test_guided_posterior_transitions_draw_what_they_score(kind, step, make_prior, states, generator, assert_mean):
    chain = make_prior(kind)
    d = chain.shape.numel()
    problem = InverseProblem(torch.randn((2, d), generator=generator, dtype=chain._options()["dtype"]), GaussianNoise(0.1))
    posterior = Posterior(chain, problem, width=16)
    y = torch.randn((2, 2), generator=generator, dtype=chain._options()["dtype"])
    x_t, t, s = states(chain, step, 1, 2)
    with torch.no_grad():
        dist = posterior.transition(x_t, t, s, y)
    assert dist.basis is not None and (dist.ratio < 1).all()
    x = dist.sample((M,), generator=generator).double()
    truth = MultivariateNormal(dist.mean.flatten(2).double(), gaussian_covariance(dist))
    assert_mean(x, dist.mean.double())
    assert_mean((x - dist.mean) ** 2, dist.variance.double())
    torch.testing.assert_close(dist.log_prob(x.to(x_t.dtype)).double(), truth.log_prob(x.flatten(3)), rtol=1e-4, atol=2e-3)


def gaussian_covariance(step):
    """E (I + V (diag(ratio^2) - 1) V^T) E as a matrix."""
    d = step.event_shape.numel()
    head = step.loc.ndim - len(step.event_shape)
    E = torch.diag_embed(step.scale.expand(step.loc.shape).flatten(head).double())
    M_ = torch.eye(d, dtype=torch.float64)
    if step.basis is not None:
        V = step.basis.double()
        M_ = M_ + (V * (step.ratio.double()[..., None, :] ** 2 - 1)) @ V.T
    return E @ M_ @ E


@pytest.fixture(params=["scalar", "elementwise", "basis", "basis-broadcast"])
def gaussian(request, generator):
    """GaussianSteps of batch (2, 3) and event (2, 2)."""
    loc = torch.randn((2, 3, 2, 2), generator=generator, dtype=torch.float64)
    V = torch.linalg.qr(torch.randn((4, 2), generator=generator, dtype=torch.float64))[0]
    scale = 0.5 + torch.rand((2, 3, 2, 2), generator=generator, dtype=torch.float64)
    match request.param:
        case "scalar":
            return GaussianStep(loc, torch.tensor(0.7, dtype=torch.float64), 2)
        case "elementwise":
            return GaussianStep(loc, scale, 2)
        case "basis":
            return GaussianStep(loc, scale, 2, V, 0.2 + torch.rand((2, 3, 2), generator=generator, dtype=torch.float64))
    return GaussianStep(loc, scale[:, :1, :1, :1], 2, V, 0.2 + torch.rand((2, 1, 2), generator=generator, dtype=torch.float64))


def test_gaussian_step_is_a_multivariate_normal(gaussian, generator, assert_mean):
    covariance = gaussian_covariance(gaussian)
    truth = MultivariateNormal(gaussian.loc.flatten(2), covariance)
    x = gaussian.sample((M,), generator=generator)
    torch.testing.assert_close(gaussian.log_prob(x), truth.log_prob(x.flatten(3)))
    torch.testing.assert_close(gaussian.variance.flatten(2), covariance.diagonal(dim1=-2, dim2=-1).expand(2, 3, 4))
    torch.testing.assert_close(gaussian.stddev**2, gaussian.variance)
    residual = (x - gaussian.mean).flatten(3)
    assert_mean(residual[..., :, None] * residual[..., None, :], covariance.expand(2, 3, 4, 4))


def test_expected_log_prob_is_the_mean_log_prob(gaussian, generator, assert_mean):
    mean = gaussian.loc + 0.3 * torch.randn(gaussian.loc.shape, generator=generator, dtype=torch.float64)
    sd = torch.tensor([[0.0, 0.4, 1.0]], dtype=torch.float64).expand(2, 3)
    expected = gaussian.expected_log_prob(mean, sd)
    truth = MultivariateNormal(gaussian.loc.flatten(2), gaussian_covariance(gaussian))
    trace = torch.linalg.inv(gaussian_covariance(gaussian)).diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(expected, truth.log_prob(mean.flatten(2)) - 0.5 * sd**2 * trace)
    x = mean + expand(sd, mean) * torch.randn((M, *mean.shape), generator=generator, dtype=torch.float64)
    assert_mean(gaussian.log_prob(x)[..., 1:], expected[..., 1:])
    torch.testing.assert_close(expected[..., 0], gaussian.log_prob(mean)[..., 0])


def test_gaussian_step_carries_gradients(gaussian, generator):
    """The score of the mean by autograd is C^-1 (x - loc)."""
    x = gaussian.sample(generator=generator)
    loc = gaussian.loc.requires_grad_()
    (score,) = torch.autograd.grad(gaussian.log_prob(x).sum(), loc)
    residual = (x - loc.detach()).flatten(2)
    truth = torch.linalg.solve(gaussian_covariance(gaussian).expand(2, 3, 4, 4), residual)
    torch.testing.assert_close(score.flatten(2), truth)


def test_draw_is_reproducible_and_leaves_the_global_state_alone():
    foreign = MultivariateNormal(torch.zeros(3), torch.eye(3))
    own = GaussianStep(torch.zeros(3), torch.tensor(1.0), 1)
    state = torch.random.get_rng_state()
    for dist in (foreign, own):
        first, second, other = (draw(dist, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


# Variances of the step


class Constant(Prior):
    """denoise = x_t / 2, with a known error."""

    error = None

    def denoise(self, x_t, t):
        return x_t / 2

    def denoiser_error(self, t):
        return None if self.error is None else self.error.double().expand(t.shape + self.shape)


@pytest.mark.parametrize("eta", [0.2, 1.0])
@pytest.mark.parametrize("variance", VARIANCES)
def test_step_variance_is_what_was_asked_for(variance, eta, schedule):
    prior = Constant((2, 2), schedule, 4, eta=eta, variance=variance, min_std=1e-3)
    prior.error = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    for t, s in itertools.pairwise(prior.times):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        b2 = sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
        sd2 = eta**2 * sigma_s**2 * b2 / sigma_t**2
        c_0 = alpha_s - alpha_t * ((sigma_s**2 - sd2).sqrt() / sigma_t)
        truth = {"analytic": sd2 + c_0**2 * prior.error, "small": sd2.expand(2, 2), "large": b2.expand(2, 2)}[variance]
        step = prior.transition(torch.ones(5, 3, 2, 2), t, s)
        torch.testing.assert_close(step.variance.double(), truth.clamp_min(1e-6).double().expand(5, 3, 2, 2), rtol=1e-5, atol=1e-9)
    unknown = Constant((2, 2), schedule, 4, eta=eta, variance=variance)
    small = Constant((2, 2), schedule, 4, eta=eta, variance="large" if variance == "large" else "small")
    x, t, s = torch.ones(1, 1, 2, 2), prior.times[1], prior.times[2]
    assert torch.equal(unknown.transition(x, t, s).variance, small.transition(x, t, s).variance)  # analytic needs the error


@pytest.mark.parametrize("kind", ("unet2d", "unet1d"))
@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
def test_last_step_is_finite(kind, variance, measured, schedule, make_prior, states):
    chain = make_prior(kind, schedule, variance=variance, measured=measured, min_std=0.02)
    x_t, t, s = states(chain, chain.steps - 1)
    assert s == -1
    with torch.no_grad():
        step = chain.transition(x_t, t, s)
        x = draw(step, torch.Generator().manual_seed(0))
    assert torch.isfinite(step.log_prob(x)).all()
    assert (step.stddev >= 0.02 * (1 - 1e-6)).all()
    if variance == "small" or (variance == "analytic" and not measured):
        torch.testing.assert_close(step.stddev, torch.full_like(x, 0.02))


def test_log_scale_multiplies_every_standard_deviation(schedule):
    prior = Constant((3,), schedule, 4)
    x, t, s = torch.ones(2, 2, 3), prior.times[1], prior.times[2]
    V = torch.linalg.qr(torch.randn(3, 1, generator=torch.Generator().manual_seed(0)))[0]
    log_scale = torch.tensor([0.0, 0.5, -1.0])
    for error, update in ((None, None), (torch.ones(3), None), (torch.ones(3), Update(x, torch.full((3,), 0.5).double())),
                          (torch.ones(3), Update(x, torch.full((1,), 0.5).double(), V))):  # fmt: skip
        prior.error = error
        plain = prior.gaussian_step(x, x, t, s, update=update)
        scaled = prior.gaussian_step(x, x, t, s, log_scale, update)
        torch.testing.assert_close(scaled.stddev, plain.stddev * log_scale.exp())


def test_an_update_shrinks_the_part_of_the_variance_that_is_uncertainty(schedule):
    """Elementwise, and along a rotated basis where all columns of the basis together are the identity: the same numbers."""
    prior = Constant((3,), schedule, 4)
    prior.error = torch.full((3,), 0.7)
    x, t, s = torch.ones(2, 2, 3, dtype=torch.float64), prior.times[1], prior.times[2]
    c_0, _, sd = schedule.reverse_step(t, s)
    shrink = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    truth = (sd**2 + c_0**2 * 0.7 * shrink).expand(2, 2, 3)
    for basis in (None, torch.eye(3, dtype=torch.float64)):
        step = prior.gaussian_step(x, x, t, s, update=Update(x, shrink, basis))
        torch.testing.assert_close(step.variance, truth, rtol=1e-6, atol=1e-9)


def test_an_update_along_a_basis_keeps_the_elements_own_errors(schedule):
    """Across the basis each element has its own variance; along it, in units of their standard deviations, as much is left as `shrink` says
    of the part that is uncertainty. Where all columns are the identity, that is element by element."""
    prior = Constant((3,), schedule, 4)
    prior.error = torch.tensor([0.01, 0.3, 0.9], dtype=torch.float64)
    x, t, s = torch.ones(2, 2, 3, dtype=torch.float64), prior.times[1], prior.times[2]
    c_0, _, sd = schedule.reverse_step(t, s)
    across = sd**2 + c_0**2 * prior.error
    v = torch.nn.functional.normalize(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), dim=0)
    step = prior.gaussian_step(x, x, t, s, update=Update(x, torch.tensor([0.2], dtype=torch.float64), v[:, None]))
    eye = torch.eye(3, dtype=torch.float64)
    root = eye + (step.ratio.double().flatten()[0] - 1) * v[:, None] * v
    whitened = root @ root.T
    torch.testing.assert_close(step.scale.double().expand(2, 2, 3)[0, 0] ** 2, across, rtol=1e-6, atol=1e-9)
    left = 1 - (c_0**2 * prior.error / across) @ v**2 * 0.8
    torch.testing.assert_close(v @ whitened @ v, left, rtol=1e-6, atol=1e-9)
    shrink = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    step = prior.gaussian_step(x, x, t, s, update=Update(x, shrink, eye))
    torch.testing.assert_close(step.variance, (sd**2 + c_0**2 * prior.error * shrink).expand(2, 2, 3), rtol=1e-6, atol=1e-9)


def test_the_floor_of_a_step_is_the_priors_not_that_of_what_y_leaves(schedule):
    """What y leaves of a step's variance is left of its floor too: else small noise has no steps that fit it."""
    prior = Constant((3,), schedule, 4, min_std=0.5)
    prior.error = torch.full((3,), 1e-4)
    x, t, s = torch.ones(2, 2, 3, dtype=torch.float64), *prior.times[-2:]
    shrink = torch.tensor([1e-4, 0.5, 1.0], dtype=torch.float64)
    for basis in (None, torch.eye(3, dtype=torch.float64)):
        step = prior.gaussian_step(x, x, t, s, update=Update(x, shrink, basis))
        left = 0.25 * shrink if basis is None else 0.25 - 1e-4 * (1 - shrink)  # along a basis of the part that is uncertainty
        torch.testing.assert_close(step.variance, left.expand(2, 2, 3), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options, message", [
    ({"eta": 0.0}, "eta"), ({"eta": 1.5}, "eta"), ({"variance": "learned"}, "variance"), ({"min_std": 0.0}, "min_std"),
    ({"steps": 0}, "steps"),
])  # fmt: skip
def test_bad_options_get_one_clear_error(options, message):
    with pytest.raises(ValueError, match=message):
        Constant((2,), VariancePreserving(), **{"steps": 3, **options})


@pytest.mark.parametrize("eta", [0.2, 1.0])
def test_the_exact_denoiser_of_a_gaussian_gives_the_gaussian(eta, generator, assert_mean):
    """x_0 ~ N(m, v): the chain with its exact denoiser and analytic variances draws N(m, v) at any eta."""
    schedule, m, v = FlowMatching(), 1.5, 0.3

    class Exact(Prior):
        def denoise(self, x_t, t):
            alpha, sigma = (expand(c, x_t) for c in self.schedule.alpha_sigma(t))
            return m + alpha * v / (alpha**2 * v + sigma**2) * (x_t - alpha * m)

        def denoiser_error(self, t):
            alpha, sigma = self.schedule.alpha_sigma(t)
            return (sigma**2 * v / (alpha**2 * v + sigma**2))[..., None].expand(t.shape + self.shape)

    x = Exact((2,), schedule, 7, eta=eta).sample(M, generator)
    assert_mean(x, m)
    assert_mean((x - m) ** 2, v)


# Paths


@pytest.fixture(params=KINDS)
def path(request, make_prior, generator):
    chain = make_prior(request.param)
    with torch.no_grad():
        return chain, rollout(chain, 5, generator=generator)


def test_path_log_prob_is_the_rollouts_and_a_loop(path):
    chain, trajectory = path
    with torch.no_grad():
        total = chain.initial((5, 1)).log_prob(trajectory.x[0]).double()
        for k in range(chain.steps):
            step = chain.transition(trajectory.x[k], trajectory.times[k], trajectory.times[k + 1])
            total = total + step.log_prob(trajectory.x[k + 1]).double()
        tolerance = {"rtol": 1e-5, "atol": 1e-3 if trajectory.x.dtype == torch.float32 else 1e-10}
        torch.testing.assert_close(trajectory.log_prob.double(), total, **tolerance)
        for chunk_size in (None, 1, 3, 7, 1000):
            torch.testing.assert_close(path_log_prob(chain, trajectory, chunk_size).double(), total, **tolerance)


def test_path_log_prob_of_many_observations(make_prior, generator):
    """B > 1: each (draw, observation) is scored against its own y."""
    prior = make_prior("mixture", steps=3)
    A = torch.randn((2, 3), generator=generator, dtype=torch.float64)
    y = torch.randn((4, 2), generator=generator, dtype=torch.float64)
    posterior = Posterior(prior, InverseProblem(A, GaussianNoise(0.5)), width=16)
    trajectory = rollout(posterior, 3, y, generator)
    assert trajectory.x.shape == (4, 3, 4, 3) and trajectory.log_prob.shape == (3, 4)
    for chunk_size in (None, 1, 5, 8):
        with torch.no_grad():
            torch.testing.assert_close(path_log_prob(posterior, trajectory, chunk_size), trajectory.log_prob)
    for n in range(3):
        for b in range(4):
            one = Trajectory(trajectory.x[:, n : n + 1, b : b + 1], trajectory.times, y[b : b + 1])
            with torch.no_grad():
                torch.testing.assert_close(path_log_prob(posterior, one)[0, 0], trajectory.log_prob[n, b])


def test_step_log_prob_picks_the_step_it_is_told(path):
    chain, trajectory = path
    k, n = torch.tensor([0, 3, 3]), torch.tensor([2, 2, 4])
    with torch.no_grad():
        scored = step_log_prob(chain, trajectory, k, n)
        for row, (i, j) in enumerate(zip(k.tolist(), n.tolist(), strict=True)):
            step = chain.transition(trajectory.x[i, j], trajectory.times[i], trajectory.times[i + 1])
            torch.testing.assert_close(scored[row], step.log_prob(trajectory.x[i + 1, j]), rtol=1e-4, atol=1e-3)
    assert scored.shape == (3, 1)


def test_rollout_repeats_with_its_generator_only(path):
    chain, _ = path
    state = torch.random.get_rng_state()
    first, second, other = (rollout(chain, 2, generator=torch.Generator().manual_seed(seed)).x for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sample_is_the_end_of_a_rollout(unet2d_prior):
    x = unet2d_prior.sample(2, torch.Generator().manual_seed(3))
    assert torch.equal(x, rollout(unet2d_prior, 2, generator=torch.Generator().manual_seed(3)).x_0[:, 0])
    assert x.shape == (2, 1, 8, 8) and not x.requires_grad


def test_rollout_from_a_level(path, generator):
    chain, trajectory = path
    start = trajectory.x[1]  # x at level K - 1
    part = rollout(chain, 5, generator=generator, start=start, level=chain.steps - 1)
    assert torch.equal(part.x[0], start) and part.steps == chain.steps - 1
    assert torch.equal(part.times, chain.times[1:])
    whole = Trajectory(part.x, part.times)
    given = path_log_prob(chain, whole) - initial_log_prob(chain, whole)  # the density of what was drawn, given the start
    torch.testing.assert_close(part.log_prob, given, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(path_log_prob(chain, part), given, rtol=1e-4, atol=1e-4)


def test_extra_noise_widens_every_step(schedule, generator, assert_mean):
    prior = Constant((2,), schedule, 1)
    x = rollout(prior, M, generator=generator, extra_noise=0.5)
    step = prior.transition(x.x[0], *prior.times)
    assert_mean((x.x_0 - step.mean)[:, 0] ** 2 / step.variance[:, 0], 1 + 0.5**2)


def test_set_steps_lays_a_new_grid(path):
    chain, _ = path
    assert chain.set_steps(6).steps == 6 and chain.times.shape == (7,)
    assert rollout(chain, 1).x.shape[0] == 7


# Renoising


@pytest.mark.parametrize("from_level, to_level", [(0, None), (0, 2), (1, 4), (2, None)])
def test_renoise_is_the_forward_markov_chain(from_level, to_level, schedule, generator, assert_mean):
    """Means and all covariances between levels are those of x_t = (alpha_t / alpha_s) x_s + b n."""
    chain = Constant((2,), schedule, 5)
    x = torch.tensor([1.5, -0.5], dtype=torch.float64)
    climb = renoise(chain, x.expand(M, 3, 2), generator, from_level=from_level, to_level=to_level)
    top = chain.steps if to_level is None else to_level
    assert climb.shape == (top - from_level + 1, M, 3, 2) and torch.equal(climb[-1], x.expand(M, 3, 2))
    times = chain.times.flip(0)[from_level : top + 1].flip(0)
    alpha, sigma = schedule.alpha_sigma(times)
    gain, own = alpha / alpha[-1], sigma**2 - (alpha / alpha[-1]) ** 2 * sigma[-1] ** 2
    residual = climb - gain[:, None, None, None] * x
    for i in range(len(times) - 1):
        assert_mean(residual[i], 0.0)
        assert_mean(residual[i] ** 2, own[i])
        for j in range(i + 1, len(times) - 1):
            assert_mean(residual[i] * residual[j], alpha[i] / alpha[j] * own[j])


def test_renoise_meets_the_chains_levels(path, generator):
    """Level k of renoise is row K - k of a trajectory."""
    chain, trajectory = path
    climb = renoise(chain, trajectory.x_0, generator)
    assert climb.shape == trajectory.x.shape and torch.equal(climb[-1], trajectory.x_0)
    again = Trajectory(climb, chain.times)
    with torch.no_grad():
        assert torch.isfinite(path_log_prob(chain, again)).all()


def test_steps_are_visited_evenly_and_where_x_0_is_decided(generator):
    """Half of the shares even, half by the fall of r_t^2; drawn so (chi-square with 4 degrees of freedom, above 25.5 once in 25,000
    seeds)."""

    class Known(Constant):
        def denoiser_error(self, t):
            return t.reshape(-1, 1).double().expand(-1, 2) ** 2

    prior = Known((2,), FlowMatching(), 5)
    shares = step_shares(prior)
    fall = prior.times[:-1] ** 2 - torch.cat([prior.times[1:-1] ** 2, torch.zeros(1)])
    torch.testing.assert_close(shares, 0.1 + 0.5 * fall / fall.sum())
    counts = torch.bincount(random_steps(shares, M, generator), minlength=5)
    assert float(((counts - M * shares) ** 2 / (M * shares)).sum()) < 25.5
    assert torch.equal(step_shares(Constant((2,), FlowMatching(), 4)), torch.full((4,), 0.25, dtype=torch.float64))
