"""The posterior starts where it says it does, sees y where it should, and is exact where the Gaussian update is; and `Particles`."""

import itertools
import math

import pytest
import torch
from torch import nn

from rtb_inverse.behaviours import Pool
from rtb_inverse.chains import Prior, Trajectory, path_log_prob, renoise, rollout
from rtb_inverse.guidance import CovarianceGuidance, GaussianGuidance, GradientGuidance, LocalGuidance
from rtb_inverse.networks import ConditionalUNet, ResidualMLP
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem, Reward
from rtb_inverse.schedules import FlowMatching, expand

KINDS = ("unet2d", "unet1d", "mixture", "gaussian")
EXACT = ("mixture", "gaussian")  # in float64, with a perceptron
B = 3


def matrix_problem(prior, m=2, std=0.3):
    A = torch.randn((m, prior.shape.numel()), generator=torch.Generator().manual_seed(5), dtype=prior._options()["dtype"])
    return InverseProblem(A, GaussianNoise(std))


def squared(prior):
    return InverseProblem(lambda x: x**2 / 2, GaussianNoise(0.3))


def rounded(prior):
    return InverseProblem(lambda x: x.detach().round(), GaussianNoise(0.3))


def reward(prior):
    return Reward(lambda x: -(x**2).flatten(1).sum(1))


def observations(problem, prior, generator):
    if isinstance(problem, Reward):
        return None
    return torch.randn((B, *problem.y_shape), generator=generator, dtype=prior._options()["dtype"])


def states(chain, generator, k=2, n=2, b=B):
    """n x b states at step k, with their times shaped as scoring shapes them."""
    x = torch.randn((n, b, *chain.shape), generator=generator, dtype=chain._options()["dtype"])
    return x, chain.times[k].expand(n, 1), chain.times[k + 1].expand(n, 1)


def perturb(parameters, generator, size=0.3):
    with torch.no_grad():
        for p in parameters:
            p += size * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def added(posterior):
    """The weights that start at zero and read what the prior does not see."""
    return [p for name, p in posterior.network.named_parameters() if "added" in name or name.startswith("last")]


def shut_input_gate(posterior):
    """From here on the network sees x_t where the prior does."""
    if hasattr(posterior.network, "input_gate"):
        with torch.no_grad():
            posterior.network.input_gate.zero_()


# The start


@pytest.mark.parametrize("problem", [matrix_problem, squared, rounded, reward])
@pytest.mark.parametrize("kind", KINDS)
def test_prior_start_is_the_prior_bit_for_bit(kind, problem, make_prior, generator):
    prior = make_prior(kind)
    posterior = Posterior(prior, problem(prior), start="prior", width=16)
    y = observations(posterior.problem, prior, generator)
    for k in range(prior.steps):
        x_t, t, s = states(prior, generator, k)
        with torch.no_grad():
            own = posterior.transition(x_t, t, s, y)
            theirs = prior.gaussian_step(x_t, prior.denoise(x_t, t), t, s)
        assert torch.equal(own.mean, theirs.mean)
        assert torch.equal(own.stddev, theirs.stddev)
        if kind in EXACT:  # whose own transition has the same mean, by another road
            torch.testing.assert_close(own.mean, prior.transition(x_t, t, s).mean)
        else:
            assert torch.equal(own.mean, prior.transition(x_t, t, s).mean)
    assert torch.equal(posterior.initial((2, B)).stddev, prior.initial((2, B)).stddev)


@pytest.mark.parametrize("kind", ("unet2d", "unet1d"))
def test_prior_start_has_the_priors_path_density(kind, make_prior, generator):
    prior = make_prior(kind)
    posterior = Posterior(prior, matrix_problem(prior), start="prior")
    y = observations(posterior.problem, prior, generator)
    path = rollout(posterior, 2, y, generator)
    with torch.no_grad():
        assert torch.equal(path_log_prob(prior, path), path_log_prob(posterior, path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem, start", [(matrix_problem, "guided"), (squared, "guided"), (rounded, "prior"), (reward, "prior")])
def test_guided_is_the_default_where_the_operator_allows_it(kind, problem, start, make_prior):
    prior = make_prior(kind)
    posterior = Posterior(prior, problem(prior), width=16)
    if kind in EXACT and problem is rounded:
        start = "guided"  # by references
    assert posterior.start == start
    own = {id(posterior.log_scale)} | ({id(posterior.gate)} if start == "guided" else set())
    assert (posterior.local_gate is not None) == (start == "guided" and kind not in EXACT)
    own |= {id(posterior.local_gate)} - {id(None)}
    assert {id(p) for p in posterior.trainable()} == own | {id(p) for p in posterior.network.parameters() if p.requires_grad}
    if start == "prior":
        with pytest.raises(ValueError, match="start='guided' needs a differentiable operator"):
            Posterior(prior, problem(prior), start="guided")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", [matrix_problem, squared])
def test_guided_start_moves_the_estimate_by_the_update(kind, problem, make_prior, generator):
    prior = make_prior(kind)
    posterior = Posterior(prior, problem(prior), width=16)
    y = observations(posterior.problem, prior, generator)
    x_t, t, _ = states(prior, generator)
    shut_input_gate(posterior)
    posterior.references = posterior.local_gate = None
    with torch.no_grad():
        x_0, log_scale, _ = posterior.denoise(x_t, t, y)
        plain = prior.denoise(x_t, t)
        guide = posterior.guide
        linear = {"mixture": LocalGuidance, "gaussian": GaussianGuidance}.get(kind, CovarianceGuidance)
        assert isinstance(guide, GradientGuidance if problem is squared else linear)
        move = guide(plain, y, prior.denoiser_error(t), guide.at(x_t, t)).delta
    assert torch.equal(x_0, plain + move) and float(move.abs().max()) > 1e-3
    assert torch.equal(torch.as_tensor(log_scale), torch.zeros_like(torch.as_tensor(log_scale)))
    with torch.no_grad():
        posterior.gate.fill_(0)
        assert torch.equal(posterior.denoise(x_t, t, y)[0], plain)


@pytest.mark.parametrize("kind", KINDS)
def test_scales_gates_and_log_z_start_neutral(kind, make_prior, generator):
    prior = make_prior(kind)
    posterior = Posterior(prior, matrix_problem(prior), width=16)
    assert torch.equal(posterior.log_scale, torch.zeros(prior.steps, dtype=posterior.log_scale.dtype))
    assert torch.equal(posterior.gate, torch.ones(prior.steps, dtype=posterior.gate.dtype))
    y = observations(posterior.problem, prior, generator)
    assert torch.equal(posterior.log_evidence(y), torch.zeros(B, dtype=y.dtype))
    assert all(float(p.detach().abs().max()) == 0 for p in added(posterior)) and added(posterior)
    if kind not in EXACT:  # the input gate of a guided start: the variance of x_0 ~ N(0, I) given x_t
        alpha, sigma = prior.schedule.alpha_sigma(prior.times[:-1].flip(0))
        torch.testing.assert_close(posterior.network.input_gate.detach(), (sigma**2 / (alpha**2 + sigma**2)).to(y.dtype))
        unguided = Posterior(prior, matrix_problem(prior), start="prior")
        assert float(unguided.network.input_gate.detach().abs().max()) == 0
    assert not posterior.train().training and not posterior.network.training


def test_each_step_has_its_own_gate_and_scale(make_prior, generator):
    """Setting those of one step changes that step and no other."""
    prior = make_prior("mixture")
    posterior = Posterior(prior, matrix_problem(prior), width=16)
    y = observations(posterior.problem, prior, generator)
    x_t, *_ = states(prior, generator)

    def steps():
        with torch.no_grad():
            return [posterior.transition(x_t, t, s, y) for t, s in itertools.pairwise(prior.times)]

    before = steps()
    with torch.no_grad():
        posterior.gate[prior.steps - 2] = 0.5  # entry K - 1 - k is step k of a path: this is k = 1
        posterior.log_scale[prior.steps - 2] = 0.4
    for k, (old, new) in enumerate(zip(before, steps(), strict=True)):
        if k == 1:
            assert not torch.equal(old.mean, new.mean)
            torch.testing.assert_close(new.stddev, old.stddev * math.exp(2 * math.tanh(0.2)))
        else:
            assert torch.equal(old.mean, new.mean) and torch.equal(old.stddev, new.stddev)


@pytest.mark.parametrize("problem", [matrix_problem, squared])
@pytest.mark.parametrize("kind", ("unet2d", "unet1d"))
def test_the_last_step_of_a_guided_network_is_not_learnt(kind, problem, make_prior, generator):
    """Whatever training does to weights and gates: it stays as it began, and states of many steps at once are those of each step alone."""
    prior = make_prior(kind)
    posterior = Posterior(prior, problem(prior))
    assert posterior.exact_end and not Posterior(prior, problem(prior), start="prior").exact_end
    y = observations(posterior.problem, prior, generator)
    x_t, *_ = states(prior, generator)
    k = torch.tensor([[prior.steps - 1], [1]])

    def steps():
        with torch.no_grad():
            own = [posterior.transition(x_t[i : i + 1], prior.times[k[i]], prior.times[k[i] + 1], y) for i in range(2)]
            return own, posterior.transition(x_t, prior.times[k].expand(2, B), prior.times[k + 1].expand(2, B), y)

    before, _ = steps()
    perturb(posterior.trainable(), generator, 0.1)
    after, together = steps()
    for name in ("mean", "stddev"):
        old, new = ([getattr(step, name).expand(1, B, *prior.shape) for step in some] for some in (before, after))
        assert torch.equal(old[0], new[0]) and not torch.allclose(old[1], new[1])
        torch.testing.assert_close(getattr(together, name), torch.cat(new), rtol=1e-4, atol=1e-5)
    assert Pool(posterior).shares[-1] == 0 < Pool(posterior).shares[:-1].min()


def test_where_one_gradient_guides_the_last_step_is_learnt(make_prior):
    """That is no exact update; nor has a perceptron beside an analytic prior an exact Gaussian to end with."""
    prior = make_prior("unet2d", measured=False)
    assert isinstance(Posterior(prior, squared(prior)).guide, GradientGuidance) and not Posterior(prior, squared(prior)).exact_end
    mixture = make_prior("mixture")
    posterior = Posterior(mixture, matrix_problem(mixture), width=16)
    assert posterior.start == "guided" and not posterior.exact_end and (Pool(posterior).shares > 0).all()


# What the network sees


@pytest.mark.parametrize("start", ["prior", "guided"])
@pytest.mark.parametrize("kind", KINDS)
def test_y_enters_through_the_added_inputs_only(kind, start, make_prior, generator):
    prior = make_prior(kind)
    posterior = Posterior(prior, matrix_problem(prior), start=start, width=16)
    first, second = (observations(posterior.problem, prior, generator) for _ in range(2))
    x_t, t, _ = states(prior, generator)
    shut_input_gate(posterior)
    with torch.no_grad():
        posterior.gate.fill_(0)  # the network's own estimate
        assert torch.equal(posterior.denoise(x_t, t, first)[0], posterior.denoise(x_t, t, second)[0])
        perturb(added(posterior), generator)
        assert not torch.allclose(posterior.denoise(x_t, t, first)[0], posterior.denoise(x_t, t, second)[0])
        assert not torch.allclose(posterior.denoise(x_t, t, first)[0], prior.denoise(x_t, t))


@pytest.mark.parametrize("kind", KINDS)
def test_condition_and_residual_are_both_read(kind, make_prior, generator):
    prior = make_prior(kind)
    posterior = Posterior(prior, matrix_problem(prior), start="prior", width=16)
    perturb(added(posterior), generator)
    first, second = (observations(posterior.problem, prior, generator) for _ in range(2))
    x_t, t, _ = states(prior, generator)
    condition, guide = posterior.problem.condition, posterior.guide

    def reads_y():
        with torch.no_grad():
            return not torch.equal(posterior.denoise(x_t, t, first)[0], posterior.denoise(x_t, t, second)[0])

    assert reads_y()
    posterior.guide = None  # no residual, the condition alone
    assert reads_y()
    posterior.problem.condition = lambda y: condition(0 * y)  # neither
    assert not reads_y()
    posterior.guide = guide  # the residual alone
    assert reads_y()


@pytest.mark.parametrize("kind", ("unet2d", "unet1d"))
def test_the_input_gate_moves_what_the_network_sees_towards_y(kind, make_prior, generator):
    """With a gate of 1 and no noise, the seen elements of x_t arrive as sigma^2 x_t + alpha y: the estimate as if x_0 ~ N(0, I) is replaced
    by y. The others arrive as they are (where no covariance says how they go with the seen ones), and the output is read at x_t."""
    prior = make_prior(kind, measured=False)
    mask = torch.rand(prior.shape, generator=generator) < 0.5
    problem = InverseProblem(lambda x: x[:, mask], GaussianNoise(1e-5), prior.shape)
    problem.mask = mask
    posterior = Posterior(prior, problem, start="prior")
    y = observations(problem, prior, generator)
    image = torch.zeros((B, *prior.shape))
    image[:, mask] = y
    for k in range(1, prior.steps):
        x_t, t, _ = states(prior, generator, k)
        alpha, sigma = (expand(c, x_t) for c in prior.schedule.alpha_sigma(t))
        with torch.no_grad():
            posterior.network.input_gate.zero_()
            posterior.network.input_gate[prior.steps - 1 - k] = 1
            seen = torch.where(mask, sigma**2 * x_t + alpha * image, x_t)
            truth = prior.schedule.to_x_0(prior.predict(prior.network, seen, t), x_t, t)
            torch.testing.assert_close(posterior.denoise(x_t, t, y)[0], truth, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_scale_head_scales_elements(kind, make_prior, generator):
    """UNet2DModel and the perceptron say a log-scale for every element; UNet1DModel none."""
    prior = make_prior(kind)
    posterior = Posterior(prior, matrix_problem(prior), start="prior", width=16)
    perturb(added(posterior), generator)
    y = observations(posterior.problem, prior, generator)
    x_t, t, s = states(prior, generator)
    with torch.no_grad():
        step = posterior.transition(x_t, t, s, y)
        ratio = step.stddev / prior.gaussian_step(x_t, x_t, t, s).stddev
    assert (ratio.std() == 0) if kind == "unet1d" else (ratio.flatten(2).std(-1) > 0).all()
    assert (ratio.log().abs() <= 2 + 1e-6).all()  # 2 tanh(log_scale / 2)


@pytest.mark.parametrize("start", ["prior", "guided"])
@pytest.mark.parametrize("problem", [matrix_problem, squared])
@pytest.mark.parametrize("kind", KINDS)
def test_many_observations_are_one_at_a_time(kind, problem, start, make_prior, generator):
    prior = make_prior(kind, dtype=torch.float64) if kind not in EXACT else make_prior(kind)
    posterior = Posterior(prior, problem(prior), start=start, width=16)
    perturb([*added(posterior), posterior.gate, posterior.log_scale, *posterior.log_z.parameters()], generator)
    y = observations(posterior.problem, prior, generator)
    path = rollout(posterior, 2, y, generator)
    with torch.no_grad():
        together, log_z = path_log_prob(posterior, path), posterior.log_evidence(y)
        likelihood = posterior.log_likelihood(path.x_0, y)
        for b in range(B):
            one = Trajectory(path.x[:, :, b : b + 1], path.times, y[b : b + 1])
            torch.testing.assert_close(path_log_prob(posterior, one)[:, 0], together[:, b])
            torch.testing.assert_close(posterior.log_evidence(y[b : b + 1])[0], log_z[b])
            torch.testing.assert_close(posterior.log_likelihood(one.x_0, one.y)[:, 0], likelihood[:, b])
    assert float(log_z.std()) > 0 and together.shape == likelihood.shape == (2, B)


# What is trained


@pytest.mark.parametrize("kind", ("unet2d", "unet1d"))
def test_lora_starts_at_the_prior_and_trains_adapters_and_added_inputs_only(kind, make_prior, generator):
    prior = make_prior(kind)
    posterior = Posterior(prior, matrix_problem(prior), start="prior", lora_rank=2)
    y = observations(posterior.problem, prior, generator)
    x_t, t, s = states(prior, generator)
    assert torch.equal(posterior.transition(x_t, t, s, y).mean, prior.transition(x_t, t, s).mean)
    named = dict(posterior.network.named_parameters())
    trained = {name for name, p in named.items() if p.requires_grad}
    assert {name for name in named if "lora_" in name or "added" in name or name == "input_gate"} == trained
    assert any("lora_" in name for name in trained) and any("added" in name for name in trained)
    full = Posterior(prior, matrix_problem(prior), start="prior")
    lora, whole = (sum(p.numel() for p in q.trainable()) for q in (posterior, full))
    assert lora < whole / 2
    held = {name: p.detach().clone() for name, p in named.items()}
    optimiser = torch.optim.SGD(posterior.trainable(), 1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        posterior.transition(x_t, t, s, y).log_prob(x_t).mean().backward()
        optimiser.step()
    changed = {name for name, p in posterior.network.named_parameters() if not torch.equal(p, held[name])}
    assert changed and changed <= trained
    assert any("lora_" in name for name in changed) and any("added" in name for name in changed)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_all_that_is_trained_and_not_the_prior(kind, make_prior, generator):
    prior = make_prior(kind)
    frozen = {name: p.clone() for name, p in prior.state_dict().items()}
    posterior = Posterior(prior, matrix_problem(prior), width=16)
    perturb(added(posterior), generator, 0.05)
    y = observations(posterior.problem, prior, generator)
    x_t, t, s = states(prior, generator)
    posterior.transition(x_t, t, s, y).log_prob(x_t).sum().backward()
    reached = [p.grad is not None and float(p.grad.abs().max()) > 0 for p in posterior.trainable()]
    assert sum(reached) >= 0.9 * len(reached)
    assert all(not p.requires_grad and p.grad is None for p in prior.parameters())
    assert all(torch.equal(frozen[name], value) for name, value in prior.state_dict().items())
    shared = {id(p) for p in prior.parameters()} & {id(p) for p in posterior.trainable()}
    assert not shared


@pytest.mark.parametrize("kind, network", [("unet2d", ConditionalUNet), ("unet1d", ConditionalUNet), ("mixture", ResidualMLP),
                                           ("gaussian", ResidualMLP)])  # fmt: skip
def test_networks_fit_the_prior(kind, network, make_prior):
    prior = make_prior(kind)
    assert isinstance(Posterior(prior, matrix_problem(prior), width=16).network, network)


def test_a_network_of_ones_own(make_prior, generator):
    class Shift(nn.Module):
        def estimate(self, prior, x_t, t):
            return prior.denoise(x_t, t), prior.denoiser_error(t)

        def forward(self, prior, x_t, t, condition, move, x_0):
            return prior.denoise(x_t, t) + 1, torch.zeros_like(x_t)

    prior = make_prior("mixture")
    posterior = Posterior(prior, matrix_problem(prior), start="prior", network=Shift())
    x_t, t, s = states(prior, generator)
    y = observations(posterior.problem, prior, generator)
    shifted = prior.gaussian_step(x_t, prior.denoise(x_t, t) + 1, t, s)
    assert torch.equal(posterior.transition(x_t, t, s, y).mean, shifted.mean)


# Exactness where the update is exact


class GaussianPrior(Prior):
    """x_0 ~ N(m, v I), its exact denoiser and error; `decode` may scale."""

    m, v = 0.5, 0.7

    def __init__(self, shape, steps, dtype=torch.float64):
        super().__init__(shape, FlowMatching(), steps, min_std=1e-6)
        self.register_buffer("one", torch.ones((), dtype=dtype))

    def denoise(self, x_t, t):
        alpha, sigma = (expand(c, x_t) for c in self.schedule.alpha_sigma(t))
        return self.m + alpha * self.v / (alpha**2 * self.v + sigma**2) * (x_t - alpha * self.m)

    def denoiser_error(self, t):
        alpha, sigma = self.schedule.alpha_sigma(t)
        error = sigma**2 * self.v / (alpha**2 * self.v + sigma**2)
        return error.reshape(t.shape + (1,) * len(self.shape)).expand(t.shape + self.shape)


class HalvedPrior(GaussianPrior):
    def decode(self, x_0):
        return x_0 / 2


def tempered_evidence(A, std, y, m, v, beta):
    """log of int N(x; m, v) N(y; A x, std^2)^beta dx by torch's MultivariateNormal: N^beta is c N(std^2 / beta)."""
    k = len(A)
    covariance = v * A @ A.T + std**2 / beta * torch.eye(k, dtype=A.dtype)
    constant = 0.5 * k * math.log(2 * math.pi * std**2 / beta) - 0.5 * beta * k * math.log(2 * math.pi * std**2)
    return torch.distributions.MultivariateNormal(m * A.sum(1), covariance).log_prob(y) + constant


@pytest.mark.parametrize("beta", [1.0, 4.0, 0.3])
@pytest.mark.parametrize("operator", ["matrix", "mask"])
def test_one_guided_step_from_noise_is_the_exact_posterior(operator, beta, generator):
    """x_1 knows nothing of x_0, so the Gaussian update is the whole posterior: the RTB residual is zero on every path."""
    d, m, std = 4, 2, 0.4
    prior = GaussianPrior((d,), 1)
    if operator == "mask":
        A, mask = torch.eye(d, dtype=torch.float64)[:m], torch.arange(d) < m
        problem = InverseProblem(lambda x: x[:, mask], GaussianNoise(std), (d,))
        problem.mask = mask
    else:
        A = torch.randn((m, d), generator=generator, dtype=torch.float64)
        problem = InverseProblem(A, GaussianNoise(std))
    posterior = Posterior(prior, problem, beta=beta, width=16)
    y = torch.randn((B, m), generator=generator, dtype=torch.float64)
    log_z = tempered_evidence(A, std, y, prior.m, prior.v, beta)
    paths = [rollout(posterior, 5, y, generator), rollout(prior, 5, y, generator)]
    paths.append(Trajectory(renoise(prior, paths[0].x_0, generator), prior.times, y))
    for path in paths:
        with torch.no_grad():
            residual = log_z + path_log_prob(posterior, path) - path_log_prob(prior, path) - posterior.log_likelihood(path.x_0, y)
        assert float(residual.abs().max()) < 1e-8


def test_likelihood_sees_the_decoded_x(generator):
    prior = HalvedPrior((2,), 3)
    problem = InverseProblem(torch.eye(2, dtype=torch.float64), GaussianNoise(0.5))
    posterior = Posterior(prior, problem, beta=2.0, width=16)
    x, y = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((4, B, 2), (B, 2)))
    truth = 2 * torch.distributions.Normal(x / 2, 0.5).log_prob(y).sum(-1)
    torch.testing.assert_close(posterior.log_likelihood(x, y), truth)
    path = rollout(posterior, 4, y, torch.Generator().manual_seed(1))
    draws = posterior.sample(y, 4, torch.Generator().manual_seed(1))
    assert torch.equal(draws.x, path.x_0 / 2) and prior.decodes and prior.data_shape == (2,)


def test_a_prior_that_does_not_know_its_error(generator):
    """A chain with a denoiser only: the error is taken to be that of x_0 ~ N(0, I), and the steps are "small"."""

    class Bare(GaussianPrior):
        def denoiser_error(self, t):
            return None

    prior = Bare((3,), 4)
    posterior = Posterior(prior, matrix_problem(prior), width=16)
    y = torch.randn((B, 2), generator=generator, dtype=torch.float64)
    path = rollout(posterior, 2, y, generator)
    assert torch.isfinite(path.log_prob).all()
    x_t, t, _ = states(prior, generator)
    error = (t**2 / ((1 - t) ** 2 + t**2))[..., None].expand(2, 1, 3)
    with torch.no_grad():
        plain = prior.denoise(x_t, t)
        torch.testing.assert_close(posterior.denoise(x_t, t, y)[0], plain + posterior.guide(plain, y, error).delta)


# Sampling and arguments


@pytest.mark.parametrize("kind", KINDS)
def test_sample_is_particles_and_repeats_with_its_generator(kind, make_prior, generator):
    prior = make_prior(kind)
    posterior = Posterior(prior, matrix_problem(prior), width=16)
    y = observations(posterior.problem, prior, generator)
    first, second, other = (posterior.sample(y, 4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.x.shape == (4, B, *prior.shape) and torch.equal(first.log_w, torch.zeros(4, B, dtype=y.dtype))
    assert torch.equal(first.x, second.x) and not torch.equal(first.x, other.x)
    assert not first.x.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_reward_posterior_draws_without_y(kind, make_prior, generator):
    posterior = Posterior(make_prior(kind), reward(None), width=16)
    assert not posterior.amortised
    assert posterior.sample(n=5, generator=generator).x.shape == (5, 1, *posterior.shape)
    assert posterior.log_evidence(None).shape == (1,)
    with pytest.raises(ValueError, match="y must be None for a Reward"):
        posterior.sample(torch.zeros(1, 3), 5)


def test_bad_arguments_get_one_clear_error(make_prior):
    prior = make_prior("unet2d")
    problem = matrix_problem(prior)
    for call, error, message in (
        (lambda: Posterior(nn.Identity(), problem), TypeError, "prior must be a Prior"),
        (lambda: Posterior(prior, nn.Identity()), TypeError, "problem must be an InverseProblem"),
        (lambda: Posterior(prior, problem, start="posterior"), ValueError, "start must be one of guided, prior"),
        (lambda: Posterior(prior, problem, beta=0.0), ValueError, "beta must be a finite number above 0"),
        (lambda: Posterior(prior, InverseProblem(torch.ones(2, 5), GaussianNoise(0.1), (5,))), ValueError, "they must agree"),
        (lambda: Posterior(prior, problem).sample(torch.zeros(B, 3), 2), ValueError, r"y must have shape \(B, 2\)"),
        (lambda: Posterior(prior, problem).sample(torch.full((1, 2), float("inf")), 2), ValueError, "y must be finite"),
        (lambda: Posterior(prior, problem).sample(torch.zeros(B, 2), 0), ValueError, "n must be an integer of at least 1"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_the_grid_is_that_of_the_prior(mixture_prior):
    posterior = Posterior(mixture_prior, matrix_problem(mixture_prior), width=8)
    assert posterior.set_steps(4) is posterior and not posterior.log_z.learned
    with pytest.raises(ValueError, match="steps of a posterior must stay 4, got 6: set_steps of your prior, then make a posterior anew"):
        posterior.set_steps(6)
    posterior.prior.set_steps(6)  # its own copy
    with pytest.raises(ValueError, match="steps of a posterior must stay 4, got 6"):
        posterior.sample(torch.zeros(B, 2), 2)
