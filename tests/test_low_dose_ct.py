"""Low-dose tomography against scipy's Poisson distribution, chords of a disc, and the linear task's filtered back-projection."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
import yaml

import tasks
from priors import held_out_digits
from rtb_inverse.chains import path_log_prob, rollout
from rtb_inverse.guidance import GradientGuidance, affine, guidance
from rtb_inverse.posterior import Posterior
from tasks import LowDoseCT, Tomography

D = torch.float64
SHAPE = (1, 8, 8)
PROBLEMS = {
    "sparse": lambda shape=SHAPE: LowDoseCT(shape, 5, photons=200.0),
    "limited": lambda shape=SHAPE: LowDoseCT(shape, 6, 60.0, photons=50.0, attenuation=4.0, background=3.0, air=-0.5),
}


@pytest.fixture(params=PROBLEMS)
def problem(request):
    return PROBLEMS[request.param]()


def randn(generator, *shape, dtype=D):
    return torch.randn(shape, generator=generator, dtype=dtype)


def disc(n: int, radius: float) -> torch.Tensor:
    """x = 1 within so many widths of the middle, -1 outside, (1, 1, n, n), by 16 x 16 samples per pixel."""
    axis = (torch.arange(16 * n, dtype=D) + 0.5) / (16 * n) - 0.5
    inside = (axis[:, None] ** 2 + axis**2 < radius**2).double()
    return 2 * torch.nn.functional.avg_pool2d(inside[None, None], 16) - 1


# The model


@pytest.mark.parametrize("shape", [SHAPE, (3, 6, 6)])
@pytest.mark.parametrize("name", PROBLEMS)
def test_counts_are_scipys_poisson(name, shape, generator):
    problem = PROBLEMS[name](shape)
    of, x = problem.config, 0.5 * randn(generator, 3, *shape)
    linear = Tomography(shape, of["angles"], of["arc"], air=of["air"])
    depth = of["attenuation"] / (1 - of["air"]) * linear(x).numpy()
    rate = of["photons"] * np.exp(-depth) + of["background"]
    y = problem.simulate(x, generator)
    assert y.shape == rate.shape == (3, *problem.y_shape) and problem.linear is False
    log_p = scipy.stats.poisson.logpmf(y.numpy(), rate).sum((1, 2, 3))
    torch.testing.assert_close(problem.log_likelihood(x, y), torch.from_numpy(log_p))
    torch.testing.assert_close(problem.noise.mean(problem(x)), torch.from_numpy(rate))


def test_counts_have_the_mean_and_the_variance_of_poisson(problem, generator, assert_mean):
    x = held_out_digits()[:1].double()
    rate = problem.noise.mean(problem(x))
    y = problem.simulate(x.expand(4000, *SHAPE), generator)
    assert torch.equal(y, y.round()) and float(y.min()) >= 0
    assert_mean(y, rate[0])
    assert_mean((y - rate).square() + 0.0, rate[0])


@pytest.mark.parametrize("radius", [0.2, 0.35])
def test_depths_of_a_disc_are_its_chords(radius):
    """2 sqrt(radius^2 - s^2) widths long, at every angle; the depth of a whole width is `attenuation`."""
    n, angles = 48, 7
    problem = LowDoseCT((1, n, n), angles, attenuation=6.0, photons=1.0)
    depth = -problem(disc(n, radius)).log()[0, 0]
    s = (torch.arange(depth.shape[0], dtype=D) - (depth.shape[0] - 1) / 2) / n
    chord = 2 * (radius**2 - s**2).clamp_min(0).sqrt()
    inside = s.abs() < radius - 3 / n
    for angle in range(angles):
        torch.testing.assert_close(depth[inside, angle], 6 * chord[inside], rtol=0.02, atol=0.02)
    assert float(depth[s.abs() > radius + 3 / n].abs().max()) < 1e-9
    whole = LowDoseCT((1, 8, 8), 1, attenuation=6.0)
    torch.testing.assert_close(whole(torch.ones(1, *SHAPE, dtype=D)).log().min(), torch.tensor(-6.0, dtype=D))


def test_nothing_in_the_way_lets_all_photons_through():
    for air in (-1.0, 0.0, 0.3):
        problem = LowDoseCT(SHAPE, 4, photons=70.0, background=2.0, air=air)
        assert torch.equal(problem(torch.full((1, *SHAPE), air)), torch.ones((1, *problem.y_shape)))
        assert float(problem.noise.mean(problem(torch.full((1, *SHAPE), air))).unique()) == 72


@pytest.mark.parametrize("value", [-30.0, -1.0, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_gradients_are_finite_at_awkward_points(value, dtype, problem, generator):
    y = problem.simulate(0.5 * randn(generator, 2, *SHAPE), generator).to(dtype)
    x = torch.full((2, *SHAPE), value, dtype=dtype, requires_grad=True)
    log_p = problem.log_likelihood(x, y)
    assert torch.isfinite(log_p).all() and torch.isfinite(torch.autograd.grad(log_p.sum(), x)[0]).all()
    update = guidance(problem)(x, y, torch.full((1, 1, 1), 0.3, dtype=D))
    assert torch.isfinite(update.delta).all()


def test_the_score_is_the_closed_form(generator):
    """d log p / dx = mu A^T ((rate - background) (1 - y / rate)), by the matrix of the linear task."""
    problem = PROBLEMS["limited"]()
    A = affine(Tomography(SHAPE, 6, 60.0, air=-0.5))[0].double()
    x = (0.5 * randn(generator, 1, *SHAPE)).requires_grad_()
    y = problem.simulate(x.detach(), generator)
    score = torch.autograd.grad(problem.log_likelihood(x, y).sum(), x)[0].flatten()
    rate = problem.noise.mean(problem(x)).detach().flatten()
    torch.testing.assert_close(score, problem.mu * A.T @ ((rate - 3) * (1 - y.flatten() / rate)), rtol=1e-4, atol=1e-4)


def test_elements_of_a_batch_do_not_meet(problem, generator):
    x, y = randn(generator, 4, *SHAPE).requires_grad_(), problem.simulate(0.5 * randn(generator, 4, *SHAPE), generator)
    log_p, seen = problem.log_likelihood(x, y), problem.condition(y)
    (gradient,) = torch.autograd.grad(log_p[1], x)
    assert float(gradient[1].abs().max()) > 0 and float(gradient[[0, 2, 3]].abs().max()) == 0
    for i in range(4):
        torch.testing.assert_close(log_p[i], problem.log_likelihood(x[i : i + 1], y[i : i + 1])[0])
        torch.testing.assert_close(seen[i], problem.condition(y[i : i + 1])[0])


@pytest.mark.parametrize("name", PROBLEMS)
def test_seeds_are_reproducible(name, generator):
    x = randn(generator, 2, *SHAPE)
    first, again, other = (PROBLEMS[name]().simulate(x, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


# What the network sees


def test_at_a_high_dose_back_projection_is_that_of_the_line_integrals_and_near_the_truth(generator):
    n = 32
    axis = (torch.arange(n, dtype=D) + 0.5) / n - 0.5
    x = (2 * torch.exp(-20 * ((axis[:, None] - 0.05) ** 2 + (axis + 0.1) ** 2)) - 1)[None, None]
    problem, linear = LowDoseCT((1, n, n), 60, photons=1e9, background=10.0), Tomography((1, n, n), 60).double()
    seen = problem.condition(problem.simulate(x, generator))
    torch.testing.assert_close(seen, linear.condition(linear(x)), rtol=0, atol=5e-3)
    assert float((seen - x)[..., 4:-4, 4:-4].square().mean().sqrt()) < 0.05
    noisy = LowDoseCT((1, n, n), 60, photons=100.0, background=10.0)
    assert float((noisy.condition(noisy.simulate(x, generator)) - x).square().mean().sqrt()) > 0.1


def test_depths_of_few_counts_are_finite():
    problem = LowDoseCT(SHAPE, 4, photons=100.0, background=3.0)
    y = torch.tensor([0.0, 3.0, 4.0, 13.0, 103.0])
    torch.testing.assert_close(problem.depth(y), -torch.tensor([0.005, 0.005, 0.01, 0.1, 1.0]).log())
    assert torch.isfinite(problem.condition(torch.zeros((1, *problem.y_shape)))).all()
    assert problem.picture(torch.zeros((2, *problem.y_shape))).shape == (2, *problem.y_shape)


# With a posterior


def test_a_guided_start_is_nearer_to_y_and_its_density_can_be_trained(unet2d_prior, generator):
    problem = PROBLEMS["sparse"]()
    assert type(guidance(problem)) is GradientGuidance
    guided, plain = Posterior(unet2d_prior, problem), Posterior(unet2d_prior, problem, start="prior")
    y = problem.simulate(held_out_digits()[:4], generator)
    near, far = (problem.log_likelihood(p.sample(y, 8, torch.Generator().manual_seed(1)).x, y).mean() for p in (guided, plain))
    assert float(near) > float(far) + 100
    path_log_prob(guided, rollout(guided, 2, y, generator)).sum().backward()
    gradients = [p.grad for p in guided.trainable() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_saved_posterior_knows_its_problem(name, unet2d_prior, generator, assert_saved):
    problem = PROBLEMS[name]()
    y = problem.simulate(held_out_digits()[:2], generator)
    assert_saved(Posterior(unet2d_prior, problem), y)


@pytest.mark.parametrize(("file", "arc"), [("low_dose_ct", 180), ("low_dose_ct_limited", 90)])
def test_yaml_builds_its_problem(file, arc):
    text = (Path(tasks.__file__).parent / f"{file}.yaml").read_text()
    arguments = yaml.safe_load(text)["model"]["init_args"]
    section = arguments["posterior"]["init_args"]["problem"]
    assert section["class_path"] == "tasks.LowDoseCT" and arguments["output"] == f"outputs/{file}" and f"tasks/{file}.yaml" in text
    assert LowDoseCT(**section["init_args"]).config["arc"] == arc


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"photons": 0}, "photons must be a finite number above 0, got 0"),
        ({"photons": -5.0}, "photons must be a finite number above 0, got -5.0"),
        ({"photons": math.inf}, "photons must be a finite number above 0, got inf"),
        ({"attenuation": 0.0}, "attenuation must be a finite number above 0, got 0.0"),
        ({"attenuation": "much"}, "attenuation must be a finite number above 0, got 'much'"),
        ({"background": -1.0}, "background must be a finite number of at least 0, got -1.0"),
        ({"background": math.nan}, "background must be a finite number of at least 0, got nan"),
        ({"air": 1.0}, "air must be a finite number below 1, got 1.0"),
        ({"angles": 0}, "angles must be an integer of at least 1, got 0"),
        ({"angles": 2.5}, "angles must be an integer of at least 1, got 2.5"),
        ({"arc": 0}, r"arc must be in \(0, 180\], got 0"),
        ({"arc": 181.0}, r"arc must be in \(0, 180\], got 181.0"),
        ({"shape": (1, 8, 6)}, r"shape must be \(C, n, n\), got \(1, 8, 6\)"),
    ],
)
def test_bad_arguments_get_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        LowDoseCT(**({"shape": SHAPE} | arguments))


@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_counts_that_are_none_are_refused(value, problem):
    y = torch.ones((1, *problem.y_shape))
    assert torch.equal(problem.check_y(y), y)
    with pytest.raises(ValueError, match=rf"y must be counts, 0, 1, 2, \.\.\., for PoissonNoise, got {value:g}"):
        problem.check_y(value * y)
    with pytest.raises(ValueError, match=r"y must have shape \(B, 1, 12, "):
        problem.check_y(y[..., :1])
