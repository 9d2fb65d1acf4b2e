"""Gradients in chunks against one autograd graph through the whole chain, in float64; the denoising loss against drawn forward paths."""

from functools import cache
from itertools import combinations

import pytest
import torch

from priors import GaussianMixturePrior
from rtb_inverse import training
from rtb_inverse.chains import Trajectory, noised_bridges, path_log_prob, random_steps, rollout
from rtb_inverse.distributions import GaussianStep
from rtb_inverse.objectives import half_square, rtb, vargrad, wake_sleep
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise, InverseProblem, Reward
from rtb_inverse.training import denoising_loss, path_backward, score, step_weights
from tasks import Inpainting

N, B = 3, 2
EVEN = torch.ones(4)  # shares of the steps


def noised(prior, x_0, generator):
    """At levels drawn evenly."""
    return noised_bridges(prior, x_0, random_steps(EVEN, len(x_0), generator), generator)


def perturb(posterior: Posterior, seed: int = 0, size: float = 0.1) -> Posterior:
    """Move every parameter, so that no gradient vanishes for being at the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in posterior.parameters():
            if parameter.requires_grad:
                parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return posterior


@cache  # its denoiser's error is measured once
def mixture(steps: int) -> GaussianMixturePrior:
    return GaussianMixturePrior.random(3, 4, 0, torch.float64, steps=steps)


def mixture_posterior(steps: int = 5, start: str = "guided") -> Posterior:
    A = torch.randn((2, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return perturb(Posterior(mixture(steps), InverseProblem(A, GaussianNoise(0.5)), start, width=16))


def unet_posterior(make_prior, steps: int = 4) -> Posterior:
    prior = make_prior("unet2d", steps=steps, dtype=torch.float64)
    return perturb(Posterior(prior, Inpainting(prior.shape, "box", 0.3)), size=0.02)


def observations(posterior: Posterior, generator: torch.Generator, b: int = B) -> torch.Tensor:
    return posterior.problem.simulate(torch.randn((b, *posterior.shape), generator=generator, dtype=torch.float64), generator)


def mixed_paths(posterior: Posterior, y: torch.Tensor, generator: torch.Generator, n: int = N) -> Trajectory:
    """One on-policy path more, then prior roll-outs: only some paths come scored."""
    return Trajectory.cat([rollout(posterior, 1, y, generator), rollout(posterior.prior, n - 1, y, generator).draws(slice(None))])


def whole_log_q(posterior: Posterior, paths: Trajectory) -> torch.Tensor:
    """log q(tau | y) in one graph, step after step."""
    total = posterior.initial(paths.x.shape[1:3]).log_prob(paths.x[0])
    for k in range(paths.steps):
        total = total + posterior.transition(paths.x[k], paths.times[k], paths.times[k + 1], paths.y).log_prob(paths.x[k + 1])
    return total


def objective(name: str, posterior: Posterior, y, log_p, log_lik):
    """A function of log q alone; a fresh graph of log Z at each call."""

    def loss(log_q):
        match name:
            case "rtb":
                return rtb(log_q, log_p, log_lik, posterior.log_evidence(y))
            case "rtb, clipped":
                return rtb(log_q, log_p, log_lik, posterior.log_evidence(y), clip=5.0)
            case "vargrad":
                return vargrad(log_q, log_p, log_lik)
            case "vargrad, log Z follows":
                return vargrad(log_q, log_p, log_lik) + half_square(posterior.log_evidence(y) - 1.0)
            case _:
                return wake_sleep(log_q, 0.1 * (log_p + log_lik - log_q))

    return loss


def gradients(posterior: Posterior) -> dict[str, torch.Tensor]:
    """Take the accumulated gradients away."""
    taken = {name: p.grad for name, p in posterior.named_parameters() if p.grad is not None}
    posterior.zero_grad(set_to_none=True)
    return taken


def assert_same_gradients(ours: dict, theirs: dict, tolerance: float = 1e-10):
    """Equal to `tolerance`, relative to the largest element of each parameter's gradient."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        size = float(expected.abs().max())
        assert float((ours[name] - expected).abs().max()) <= tolerance * size, name


def in_one_graph(posterior, paths, loss) -> tuple[torch.Tensor, dict]:
    value = loss(whole_log_q(posterior, paths))
    value.backward()
    return value.detach(), gradients(posterior)


OBJECTIVES = ("rtb", "rtb, clipped", "vargrad", "vargrad, log Z follows", "wake_sleep")


@pytest.mark.parametrize("chunk_size", [None, 7, 1])
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("start", ["guided", "prior"])
def test_chunked_gradient_is_that_of_the_whole_graph(start, name, chunk_size, generator):
    posterior = mixture_posterior(start=start)
    y = observations(posterior, generator)
    paths = mixed_paths(posterior, y, generator)
    log_q, log_p, log_lik = score(posterior, paths)
    loss = objective(name, posterior, y, log_p, log_lik)
    value = path_backward(posterior, paths, log_q, loss, chunk_size=chunk_size)
    ours = gradients(posterior)
    expected, theirs = in_one_graph(posterior, paths, loss)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    assert_same_gradients(ours, theirs)
    # nothing compared was zero, and every trained parameter was compared
    assert all(bool(g.abs().max() > 0) for g in theirs.values())
    trained = {id(p) for p in posterior.trainable()}
    if "rtb" in name or "follows" in name:
        trained |= {id(p) for p in posterior.log_z.parameters()}
    assert {id(p) for n, p in posterior.named_parameters() if n in ours} == trained


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("name", ["rtb", "vargrad"])
def test_chunked_gradient_of_a_unet(name, chunk_size, generator, make_prior):
    posterior = unet_posterior(make_prior)
    y = observations(posterior, generator)
    paths = mixed_paths(posterior, y, generator)
    log_q, log_p, log_lik = score(posterior, paths, chunk_size)
    loss = objective(name, posterior, y, log_p, log_lik)
    path_backward(posterior, paths, log_q, loss, chunk_size=chunk_size)
    ours = gradients(posterior)
    theirs = in_one_graph(posterior, paths, loss)[1]
    dead = {key for key, g in theirs.items() if float(g.abs().max()) == 0}
    assert len(dead) < len(theirs) / 4
    assert_same_gradients(ours, theirs, 1e-9)


def test_a_step_on_the_gradient_lowers_the_loss(generator):
    """The sign: a small step against the gradient lowers rtb on the same paths by step |gradient|^2."""
    posterior = mixture_posterior()
    y = observations(posterior, generator)
    paths = mixed_paths(posterior, y, generator)
    log_q, log_p, log_lik = score(posterior, paths)
    loss = objective("rtb", posterior, y, log_p, log_lik)
    before = path_backward(posterior, paths, log_q, loss, chunk_size=4)
    taken = gradients(posterior)
    square, step = sum(float(g.square().sum()) for g in taken.values()), 1e-9
    with torch.no_grad():
        for key, parameter in posterior.named_parameters():
            if key in taken:
                parameter -= step * taken[key]
        after = loss(whole_log_q(posterior, paths))
    assert float(before - after) == pytest.approx(step * square, rel=0.01)


@pytest.mark.parametrize(("steps", "fraction", "count"), [(4, 0.5, 2), (3, 0.34, 1), (4, 0.75, 3), (4, 0.01, 1)])
def test_a_subset_of_steps_is_unbiased(steps, fraction, count, generator, monkeypatch):
    """The average over all subsets of that size is the whole gradient; no one subset's is."""
    posterior = mixture_posterior(steps)
    y = observations(posterior, generator)
    paths = mixed_paths(posterior, y, generator)
    log_q, log_p, log_lik = score(posterior, paths)
    loss = objective("rtb", posterior, y, log_p, log_lik)
    _, whole = in_one_graph(posterior, paths, loss)
    subsets = list(combinations(range(steps), count))
    total = {}
    for subset in subsets:
        order = torch.tensor([*subset, *(k for k in range(steps) if k not in subset)])
        monkeypatch.setattr(torch, "randperm", lambda *args, order=order, **options: order)
        path_backward(posterior, paths, log_q, loss, chunk_size=4, step_fraction=fraction)
        part = gradients(posterior)
        assert float((part["network.last.weight"] - whole["network.last.weight"]).abs().max()) > 1e-3
        for key, value in part.items():
            total[key] = total.get(key, 0) + value / len(subsets)
    assert_same_gradients(total, whole)


def test_subsets_of_steps_are_drawn_evenly(generator, monkeypatch):
    """Chi-square over the 6 subsets of 2 of 4 steps, 1,200 draws: a correct draw exceeds 25.7 once in 10,000 seeds."""
    posterior = mixture_posterior(4)
    y = observations(posterior, generator)
    paths = mixed_paths(posterior, y, generator)
    counts = dict.fromkeys(combinations(range(4), 2), 0)

    def note(trajectory, chunk_size, steps):
        counts[tuple(sorted(steps.tolist()))] += 1
        return iter(())

    monkeypatch.setattr(training, "chunks", note)
    for _ in range(1200):
        path_backward(posterior, paths, torch.zeros((N, B)), lambda log_q: log_q.sum(), step_fraction=0.5, generator=generator)
    assert sum((c - 200) ** 2 / 200 for c in counts.values()) < 25.7


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan")])
def test_step_fraction_must_be_a_share(fraction, generator):
    posterior = mixture_posterior(3)
    paths = rollout(posterior, N, observations(posterior, generator), generator)
    with pytest.raises(ValueError, match=r"step_fraction must be in \(0, 1\]"):
        path_backward(posterior, paths, paths.log_prob, lambda log_q: log_q.sum(), step_fraction=fraction)


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_score_is_path_by_path(chunk_size, generator):
    posterior = mixture_posterior()
    y = observations(posterior, generator)
    paths = mixed_paths(posterior, y, generator)
    assert len(paths.log_prob) == 1
    log_q, log_p, log_lik = score(posterior, paths, chunk_size)
    assert not (log_q.requires_grad or log_p.requires_grad or log_lik.requires_grad)
    torch.testing.assert_close(log_q, whole_log_q(posterior, paths).detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_p, path_log_prob(posterior.prior, paths), rtol=1e-10, atol=1e-10)
    A = posterior.problem.operator.matrix
    normal = torch.distributions.Normal(paths.x_0 @ A.T, 0.5)
    torch.testing.assert_close(log_lik, normal.log_prob(y).sum(-1), rtol=1e-10, atol=1e-10)


# Memory


class Held:
    """Counts the bytes that autograd holds, and their peak."""

    now = peak = 0

    class Box:
        def __init__(self, owner, tensor):
            self.owner, self.tensor, self.size = owner, tensor, tensor.numel() * tensor.element_size()
            owner.now += self.size
            owner.peak = max(owner.peak, owner.now)

        def __del__(self):
            self.owner.now -= self.size

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: Held.Box(self, tensor), lambda box: box.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)


def peak_bytes(steps: int, chunk_size: int | None) -> int:
    generator = torch.Generator().manual_seed(0)
    posterior = mixture_posterior(steps)
    y = observations(posterior, generator)
    paths = rollout(posterior, 4, y, generator)
    log_q, log_p, log_lik = score(posterior, paths, chunk_size)
    with Held() as held:
        path_backward(posterior, paths, log_q, objective("vargrad", posterior, y, log_p, log_lik), chunk_size=chunk_size)
    return held.peak


def test_memory_does_not_grow_with_the_number_of_steps():
    short, long = peak_bytes(8, 16), peak_bytes(32, 16)
    assert short > 10_000
    assert long <= 1.05 * short
    assert peak_bytes(32, None) > 3 * peak_bytes(8, None)  # so it is the chunk that bounds it


def test_a_chunk_is_a_bound_on_states(generator, monkeypatch):
    posterior = mixture_posterior(6)
    paths = rollout(posterior, 5, observations(posterior, generator), generator)
    sizes = []

    def transition(x_t, *args):
        sizes.append(x_t.shape[:-1].numel())
        return Posterior.transition(posterior, x_t, *args)

    monkeypatch.setattr(posterior, "transition", transition)
    path_backward(posterior, paths, paths.log_prob, lambda log_q: log_q.sum(), chunk_size=8)
    assert max(sizes) == 8
    assert sum(sizes) == 6 * 5 * B


# Conditional denoising


def drawn_loss(posterior: Posterior, x_0: torch.Tensor, y: torch.Tensor, generator: torch.Generator, m: int) -> torch.Tensor:
    """m draws of - K log q(x_s | x_t, y) / d with x_s, then x_t from x_s, drawn by the forward process."""
    index = torch.randint(len(x_0), (m,), generator=generator)
    x_0, y = x_0[index], y[index]
    k = torch.randint(posterior.steps, (m,), generator=generator)
    t, s = posterior.times[k], posterior.times[k + 1]
    (alpha_s, sigma_s), (alpha_t, sigma_t) = ((c[:, None] for c in posterior.schedule.alpha_sigma(time)) for time in (s, t))
    a = alpha_t / alpha_s
    n_s, n_t = (torch.randn(x_0.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    x_s = alpha_s * x_0 + sigma_s * n_s
    x_t = a * x_s + (sigma_t**2 - a**2 * sigma_s**2).sqrt() * n_t
    with torch.no_grad():
        return -posterior.transition(x_t, t, s, y).log_prob(x_s) * posterior.steps / x_0.shape[1]


@pytest.mark.parametrize("start", ["guided", "prior"])
def test_denoising_loss_is_the_mean_over_drawn_paths(start, generator, monkeypatch):
    posterior = mixture_posterior(4, start)
    posterior.references = None  # slow for so many states
    x_0 = posterior.prior.sample(4, generator)
    y = posterior.problem.simulate(x_0, generator)
    drawn = drawn_loss(posterior, x_0, y, generator, 100_000)

    def closed_form():
        batches = []
        for _ in range(50):
            index = torch.randint(4, (1000,), generator=generator)
            with torch.no_grad():
                batches.append(denoising_loss(posterior, noised(posterior.prior, x_0[index], generator), y[index]))
        return torch.stack(batches)

    def z(values):
        error = (drawn.var() / len(drawn) + values.var() / len(values)).sqrt()
        return float((values.mean() - drawn.mean()) / error)

    assert abs(z(closed_form())) < 4  # a correct loss fails once in 16,000 seeds
    # without the spread of x_s about its mean it is another number

    monkeypatch.setattr(GaussianStep, "expected_log_prob", lambda self, mean, sd: self.log_prob(mean))
    assert abs(z(closed_form())) > 10


def test_denoising_gradient_reaches_every_parameter_of_the_chain(generator):
    posterior = mixture_posterior(4)
    x_0 = posterior.prior.sample(64, generator)
    denoising_loss(posterior, noised(posterior.prior, x_0, generator), posterior.problem.simulate(x_0, generator)).backward()
    taken = gradients(posterior)
    trained = {id(p) for p in posterior.trainable()}
    assert {id(p) for n, p in posterior.named_parameters() if n in taken} == trained
    assert all(bool(torch.isfinite(g).all()) and bool(g.abs().max() > 0) for g in taken.values())


def test_denoising_without_an_observation(generator):
    posterior = perturb(Posterior(mixture(4), Reward(lambda x: -x.square().sum(-1)), width=16))
    loss = denoising_loss(posterior, noised(mixture(4), mixture(4).sample(32, generator), generator), None)
    loss.backward()
    assert loss.ndim == 0
    assert bool(torch.isfinite(loss))
    assert posterior.network.last.weight.grad.abs().max() > 0


# Weights of the steps


def test_step_weights_even_out_the_gradient_noise(generator):
    """The spread of the gradient in the last layer's shift, step by step: it falls more than sixfold from the last step to the
    least, with the weights less than half as much."""
    posterior = Posterior(mixture(12), InverseProblem(torch.ones((1, 3), dtype=torch.float64), GaussianNoise(0.5)), width=16)
    weights, M = step_weights(posterior), 256
    assert float(weights.mean()) == pytest.approx(1) and weights.shape == (12,)
    noises = []
    for k in range(12):
        x_0 = posterior.prior.sample(M, generator)
        y = posterior.problem.simulate(x_0, generator)
        t, s = posterior.times[k], posterior.times[k + 1]
        x_t = posterior.schedule.add_noise(x_0, torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype), t)
        c_0, c_t, sd = posterior.schedule.reverse_step(t, s, 1.0)
        log_q = posterior.transition(x_t, t, s, y).expected_log_prob(c_0 * x_0 + c_t * x_t, sd.expand(M))
        bias = posterior.network.last.bias
        gradients = torch.stack([torch.autograd.grad(one, bias, retain_graph=True)[0][:3] for one in log_q])
        noises.append(float(gradients.std(0).norm()))
    noise = torch.tensor(noises)
    plain, weighted = float(noise[-1] / noise.min()), float((weights * noise).max() / (weights * noise).min())
    assert plain > 6 and weighted < plain / 2


def test_weights_multiply_the_loss_of_their_step(generator):
    posterior = mixture_posterior(4)
    x_0 = posterior.prior.sample(64, generator)
    y, bridges = posterior.problem.simulate(x_0, generator), noised(posterior.prior, x_0, generator)
    weights = torch.tensor([1.0, 2.0, 0.5, 0.5])
    for k in range(4):
        bridges.k = torch.full((64,), k)
        plain, weighted = (denoising_loss(posterior, bridges, y, w) for w in (None, weights))
        torch.testing.assert_close(weighted, weights[k] * plain, check_dtype=False)
