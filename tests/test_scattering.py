"""Inverse scattering against the series of a cylinder (Mie), deepinv's physics, Born's limit, and its own equation."""

import math
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import yaml

import tasks
from priors import DiffusersPrior, held_out_digits
from rtb_inverse.chains import path_log_prob, rollout
from rtb_inverse.guidance import DenseGuidance, GradientGuidance, guidance
from rtb_inverse.posterior import Posterior
from tasks import InverseScattering
from tasks.scattering import on_circle

pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:deepinv\.")

D = torch.float64
SHAPE = (1, 8, 8)
ROOT = Path(tasks.__file__).resolve().parents[1]
PROBLEMS = {
    "born": lambda: InverseScattering(SHAPE, 3, 5, 0.4, 1.5, "born", 0.05),
    "lippmann_schwinger": lambda: InverseScattering(SHAPE, 3, 5, 0.8, 1.5, "lippmann_schwinger", 0.05),
}


@pytest.fixture(params=PROBLEMS)
def name(request):
    return request.param


def randn(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=D)


def field(problem, x) -> torch.Tensor:
    """A(x), complex, (M, T, R)."""
    return torch.view_as_complex(problem(x))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def disc(n: int, radius: float, x: float = 0.0, y: float = 0.0) -> torch.Tensor:
    """The share of each pixel that lies in a disc, (1, 1, n, n)."""
    axis = (torch.arange(16 * n, dtype=D) + 0.5) / (16 * n) - 0.5
    inside = ((axis - x) ** 2 + (-axis[:, None] - y) ** 2 < radius**2).double()
    return torch.nn.functional.avg_pool2d(inside[None, None], 16)


# The operator


def mie(k: float, radius: float, contrast: float, theta: np.ndarray) -> np.ndarray:
    """Field scattered by a homogeneous cylinder at the middle, at angles theta from the direction of the wave and distance 1."""
    total, root = np.zeros(len(theta), complex), math.sqrt(1 + contrast)
    for n in range(-20, 21):
        J, J1 = scipy.special.jv(n, k * radius), scipy.special.jvp(n, k * radius)
        H, H1 = scipy.special.hankel1(n, k * radius), scipy.special.h1vp(n, k * radius)
        inner, inner1 = scipy.special.jv(n, root * k * radius), root * scipy.special.jvp(n, root * k * radius)
        total += 1j**n * (J1 * inner - J * inner1) / (H * inner1 - H1 * inner) * scipy.special.hankel1(n, k) * np.exp(1j * n * theta)
    return total


@pytest.mark.parametrize(("n", "wavelengths", "contrast", "error"), [(8, 1, 0.3, 0.08), (24, 1, 0.3, 0.01), (24, 2, 0.5, 0.03)])
def test_a_cylinder_scatters_as_in_its_series(n, wavelengths, contrast, error):
    problem, theta = InverseScattering((1, n, n), 4, 12, contrast, wavelengths), 2 * np.pi * np.arange(12) / 12
    series = mie(2 * math.pi * wavelengths, 0.3, contrast, theta)
    expected = torch.from_numpy(np.stack([np.roll(series, 3 * wave) for wave in range(4)]))
    y = field(problem, 2 * disc(n, 0.3) - 1)[0]
    assert distance(y, expected) < error
    born = InverseScattering((1, n, n), 4, 12, contrast, wavelengths, "born")
    assert distance(field(born, 2 * disc(n, 0.3) - 1)[0], expected) > 0.2  # waves are scattered more than once


def deepinv_physics(n: int, T: int, R: int, wavelengths: float, **solver):
    """deepinv's model of the same waves and receivers, on points from end to end of our pixels' middles."""
    from deepinv.physics import Scattering

    return Scattering(
        n, on_circle(R).T, on_circle(T).T, 2 * math.pi * wavelengths, Scattering.SolverConfig(**solver), (n - 1) / n, "plane_wave"
    )


def with_deepinvs_functions(problem: InverseScattering) -> InverseScattering:
    """Its g, G and v replaced by deepinv's."""
    from deepinv.physics.scattering import apply_filter

    wavelengths, n, (T, R, _) = problem.config["wavelengths"], problem.shape[-1], problem.y_shape
    physics, k, area = deepinv_physics(n, T, R, wavelengths), 2 * math.pi * wavelengths, (n / (n - 1)) ** 2
    points = torch.eye(n * n, dtype=torch.complex128).reshape(n * n, 1, n, n)
    theirs = {
        "g": area * k**2 * apply_filter(points, physics.solver.g_fourier).reshape(n * n, -1).T,
        "G": area * physics.born_operator.green_operator[0].reshape(R, -1), "v": physics.incident_field[0].reshape(T, -1).T,
    }  # fmt: skip
    torch.testing.assert_close(torch.view_as_complex(problem.v), theirs["v"])
    for name, value in theirs.items():
        problem.register_buffer(name, torch.view_as_real(value.contiguous()))
    return problem


@pytest.mark.parametrize("model", PROBLEMS)
def test_deepinvs_solver_is_deepinvs_physics(model, generator):
    """Up to the area of a pixel, which is a square of (n - 1) / n of ours there."""
    n = 8
    f = torch.rand((2, 1, n, n), generator=generator, dtype=D)
    physics = deepinv_physics(n, 3, 5, 1.5, tol=1e-9)
    problem = InverseScattering((1, n, n), 3, 5, 0.7, 1.5, model, solver="deepinv")
    theirs = (physics.A if model == "lippmann_schwinger" else physics.born_operator.A)(f.cdouble() * (n / (n - 1)) ** 2)
    torch.testing.assert_close(field(problem, 2 * f / 0.7 - 1), theirs, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(problem((2 * f / 0.7 - 1).float()), torch.view_as_real(theirs).float(), rtol=1e-5, atol=1e-6)


def test_deepinvs_solver_where_deepinvs_fails(generator):
    """An empty image among others; waves of a frequency of its grid, where it is 0 / 0 up to rounding."""
    x = torch.cat([torch.full((1, *SHAPE), -1.0, dtype=D), randn(generator, 1, *SHAPE)])
    problem = InverseScattering(SHAPE, 3, 5, 0.7, 2.0, solver="deepinv")
    y = problem(x)
    assert not y[0].any() and distance(problem(x[1:]), y[1:]) < 1e-9
    nearby = InverseScattering(SHAPE, 3, 5, 0.7, 2.0001, solver="deepinv")
    assert 1e-4 < distance(nearby(x), y) < 1e-2


def test_deepinvs_solver_has_two_derivatives(generator):
    """Those of the direct one, with its Green's function."""
    theirs = InverseScattering(SHAPE, 2, 3, 0.8, 1.5, solver="deepinv")
    ours = with_deepinvs_functions(InverseScattering(SHAPE, 2, 3, 0.8, 1.5))
    x, w = randn(generator, 3, *SHAPE), randn(generator, 3, *SHAPE)
    x[1], w[2] = -1, 0

    def derivatives(problem):
        slope = torch.func.jvp(problem, (x,), (w,))[1]
        pull = torch.func.vjp(problem, x)[1]
        point = x.clone().requires_grad_()
        first = torch.autograd.grad(problem(point).square().sum(), point, create_graph=True)[0]
        return slope, pull(slope)[0], first.detach(), torch.autograd.grad((first * w).sum(), point)[0]

    for a, b in zip(derivatives(theirs), derivatives(ours), strict=True):
        assert float(b.norm()) > 0 and distance(a, b) < 1e-6


def test_born_is_deepinvs(generator):
    """Up to the mean of the Green's function over a pixel."""
    n, wavelengths = 10, 1.5
    x = randn(generator, 2, 1, n, n)
    ours, theirs = (field(InverseScattering((1, n, n), 3, 5, 0.7, wavelengths, "born", solver=s), x) for s in ("direct", "deepinv"))
    ka = 2 * math.pi * wavelengths / (n * math.sqrt(math.pi))
    torch.testing.assert_close(ours, theirs * 2 * scipy.special.j1(ka) / ka)


def test_the_direct_solver_finds_the_field_of_deepinvs(generator):
    """With its Green's function in the place of ours, for every image of a batch."""
    x = randn(generator, 2, *SHAPE)
    y = field(with_deepinvs_functions(InverseScattering(SHAPE, 3, 5, 0.7, 1.5)), x)
    assert distance(field(InverseScattering(SHAPE, 3, 5, 0.7, 1.5, solver="deepinv"), x), y) < 1e-6
    assert distance(field(InverseScattering(SHAPE, 3, 5, 0.7, 1.5, "born", solver="deepinv"), x), y) > 0.1


def test_on_a_fine_grid_the_solvers_agree():
    x = 2 * disc(28, 0.2, 0.1, 0.05) - 1
    ours, theirs = (field(InverseScattering((1, 28, 28), 2, 8, 0.3, 2.0, solver=solver), x) for solver in ("direct", "deepinv"))
    assert distance(ours, theirs) < 0.04


def test_the_field_obeys_lippmann_and_schwinger(generator):
    """As the sum of all orders of scattering, G f (v + g f v + g f g f v + ...), where that converges."""
    problem = InverseScattering(SHAPE, 3, 5, 0.1, 1.0)
    g, G, v = (torch.view_as_complex(getattr(problem, name)) for name in ("g", "G", "v"))
    x = torch.rand((1, *SHAPE), generator=generator, dtype=D)
    f = 0.1 * (x.flatten() + 1) / 2
    u, term = v.clone(), v
    for _ in range(60):
        term = g @ (f[:, None] * term)
        u = u + term
    torch.testing.assert_close(field(problem, x)[0], (G @ (f[:, None] * u)).T)
    torch.testing.assert_close(g, g.T)  # reciprocity


def test_born_is_the_first_order_of_lippmann_and_schwinger(generator):
    x = randn(generator, 2, *SHAPE)
    errors = []
    for contrast in (1e-2, 1e-3):
        born, full = (field(InverseScattering(SHAPE, 3, 5, contrast, 1.5, model), x) for model in ("born", "lippmann_schwinger"))
        errors.append(distance(born, full))
    assert errors[0] < 0.1 and errors[0] / errors[1] == pytest.approx(10, rel=0.1)  # what is left is of second order in f
    full = InverseScattering(SHAPE, 3, 5, 0.6, 1.5)
    slope = torch.func.jvp(full, (-torch.ones((2, *SHAPE), dtype=D),), (x,))[1]  # at the empty medium
    born = InverseScattering(SHAPE, 3, 5, 0.6, 1.5, "born")
    torch.testing.assert_close(slope, born(x) - born(torch.zeros_like(x)))


def test_nothing_there_scatters_nothing(name):
    assert not PROBLEMS[name]()(torch.full((2, *SHAPE), -1.0)).any()


def test_a_quarter_turn_of_the_object_turns_the_field(generator):
    """Waves and receivers go round together: by one of 4 waves and by 3 of 12 receivers."""
    x = randn(generator, 1, *SHAPE)
    for model in PROBLEMS:
        problem = InverseScattering(SHAPE, 4, 12, 0.5, 1.5, model)
        turned = field(problem, torch.rot90(x, 1, (2, 3)))  # counterclockwise
        torch.testing.assert_close(turned, field(problem, x).roll((1, 3), (1, 2)))


def test_back_projection_is_the_adjoint_of_born(generator):
    problem, x = PROBLEMS["born"](), randn(generator, 3, *SHAPE)
    y = randn(generator, 3, *problem.y_shape)
    empty = -torch.ones_like(x)
    forth = problem(x + empty)  # B (contrast x / 2)
    back = problem.condition(y) + 1
    torch.testing.assert_close((forth * y).sum((1, 2, 3)), (x * back).sum((1, 2, 3)) * 0.4**2 / (4 * problem.step))
    torch.testing.assert_close(problem.condition(torch.zeros_like(y)), empty)


def test_back_projections_step_is_the_best(generator):
    """Of a white f: |s B^T B f - f|^2 is least in the mean."""
    problem = PROBLEMS["born"]()
    B = torch.func.jacrev(problem)(torch.zeros((1, *SHAPE), dtype=D)).reshape(-1, 64) * 2 / 0.4
    M = B.T @ B
    assert problem.step == pytest.approx(float(M.trace() / M.square().sum()))


# The likelihood and its derivatives


def test_noise_is_circular_and_scipys(name, generator):
    problem, x = PROBLEMS[name](), randn(generator, 200, *SHAPE)
    y = problem.simulate(x, generator)
    assert y.shape == (200, 3, 5, 2) and problem.linear is (name == "born")
    log_p = scipy.stats.norm.logpdf(y, problem(x), 0.05 / math.sqrt(2)).sum((1, 2, 3))
    torch.testing.assert_close(problem.log_likelihood(x, y), torch.from_numpy(log_p))
    noise = torch.view_as_complex(y - problem(x))
    assert abs(float(noise.abs().square().mean()) / 0.05**2 - 1) < 4.5 / noise.numel() ** 0.5
    assert abs(complex((noise**2).mean())) / 0.05**2 < 4.5 * (2 / noise.numel()) ** 0.5


def test_two_derivatives_are_those_of_differences(name, generator):
    problem, x, w = PROBLEMS[name](), randn(generator, 1, *SHAPE), randn(generator, 1, *SHAPE)
    slope = torch.func.jvp(problem, (x,), (w,))[1]
    torch.testing.assert_close(slope, (problem(x + 1e-5 * w) - problem(x - 1e-5 * w)) / 2e-5, rtol=1e-5, atol=1e-7)
    x = x.requires_grad_()
    first = torch.autograd.grad(problem(x).square().sum(), x, create_graph=True)[0]
    second = torch.autograd.grad((first * w).sum(), x)[0]
    ahead, behind = (torch.func.grad(lambda x: problem(x).square().sum())(x + step * w) for step in (1e-5, -1e-5))
    torch.testing.assert_close(second, ((ahead - behind) / 2e-5).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [-30.0, -1.0, 1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_gradients_are_finite_at_awkward_points(value, dtype, name, generator):
    problem = PROBLEMS[name]()
    y = problem.simulate(randn(generator, 2, *SHAPE), generator).to(dtype)
    x = torch.full((2, *SHAPE), value, dtype=dtype, requires_grad=True)
    log_p = problem.log_likelihood(x, y)
    assert log_p.dtype == dtype and torch.isfinite(log_p).all()
    assert torch.isfinite(torch.autograd.grad(log_p.sum(), x)[0]).all()
    assert torch.isfinite(guidance(problem)(x, y, torch.full((1, 1, 1), 0.3, dtype=D)).delta).all()


def test_elements_of_a_batch_do_not_meet(name, generator, monkeypatch):
    problem = PROBLEMS[name]()
    x, y = randn(generator, 5, *SHAPE).requires_grad_(), randn(generator, 5, *problem.y_shape)
    log_p, seen = problem.log_likelihood(x, y), problem.condition(y)
    (gradient,) = torch.autograd.grad(log_p[1], x)
    assert float(gradient[1].abs().max()) > 0 and float(gradient[[0, 2, 3, 4]].abs().max()) == 0
    for i in range(5):
        torch.testing.assert_close(log_p[i], problem.log_likelihood(x[i : i + 1], y[i : i + 1])[0])
        torch.testing.assert_close(seen[i], problem.condition(y[i : i + 1])[0])
    together = problem(x)
    monkeypatch.setattr("tasks.scattering.AT_ONCE", 2 * 64 * 64 * 2)
    torch.testing.assert_close(problem(x), together)  # two systems at a time


def test_large_systems_are_right_with_threads_that_were_set(generator):
    """Where torch solves several systems of more than about 150 unknowns at once, it may get any wrong, by 1 %."""
    problem, x, threads = InverseScattering((1, 16, 16), 2, 3, 0.5, 1.5), randn(generator, 3, 1, 16, 16), torch.get_num_threads()
    expected = problem(x)
    torch.set_num_threads(2)
    try:
        assert distance(problem(x), expected) < 1e-9
    finally:
        torch.set_num_threads(threads)


def test_seeds_are_reproducible(name, generator):
    x = randn(generator, 2, *SHAPE)
    first, again, other = (PROBLEMS[name]().simulate(x, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


# With a posterior


def test_a_guided_start_is_nearer_to_y_and_its_density_can_be_trained(name, unet2d_prior, generator):
    problem = PROBLEMS[name]()
    assert type(guidance(problem)) is {"born": DenseGuidance, "lippmann_schwinger": GradientGuidance}[name]
    guided, plain = Posterior(unet2d_prior, problem), Posterior(unet2d_prior, problem, start="prior")
    y = problem.simulate(held_out_digits()[:2], generator)
    near, far = (problem.log_likelihood(p.sample(y, 4, torch.Generator().manual_seed(1)).x, y).mean() for p in (guided, plain))
    assert float(near) > float(far) + 100
    path_log_prob(guided, rollout(guided, 2, y, generator)).sum().backward()
    gradients = [p.grad for p in guided.trainable() if p.grad is not None]
    assert gradients and all(torch.isfinite(g).all() for g in gradients)


def test_a_guided_start_on_deepinvs_solver(generator, assert_saved):
    """Both models; the paths have one density, drawn and read."""
    prior = DiffusersPrior.from_pretrained(str(ROOT / "priors" / "digits")).set_steps(2)
    for model in PROBLEMS:
        problem = InverseScattering(SHAPE, 1, 3, 0.5, 1.5, model, 0.05, solver="deepinv")
        posterior = Posterior(prior, problem, second_look=False, references=False)
        y = problem.simulate(held_out_digits()[:1], generator)
        paths = rollout(posterior, 2, y, generator)
        with torch.no_grad():
            torch.testing.assert_close(path_log_prob(posterior, paths), paths.log_prob, rtol=0.0, atol=1e-3)
    assert_saved(posterior, y)


def test_a_saved_posterior_knows_its_problem(name, unet2d_prior, generator, assert_saved):
    problem = PROBLEMS[name]()
    y = problem.simulate(held_out_digits()[:2], generator)
    assert problem.picture(y).shape == (2, 1, 3, 5)
    assert_saved(Posterior(unet2d_prior, problem), y)


def test_yaml_builds_its_problem():
    text = (Path(tasks.__file__).parent / "scattering.yaml").read_text()
    arguments = yaml.safe_load(text)["model"]["init_args"]
    section = arguments["posterior"]["init_args"]["problem"]
    assert section["class_path"] == "tasks.InverseScattering"
    assert arguments["output"] == "outputs/scattering" and "tasks/scattering.yaml" in text
    assert InverseScattering(**section["init_args"]).shape == SHAPE


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"transmitters": 0}, "transmitters must be an integer of at least 1, got 0"),
        ({"receivers": 2.5}, "receivers must be an integer of at least 1, got 2.5"),
        ({"contrast": 0.0}, "contrast must be a finite number above 0, got 0.0"),
        ({"contrast": math.nan}, "contrast must be a finite number above 0, got nan"),
        ({"wavelengths": -1}, "wavelengths must be a finite number above 0, got -1"),
        ({"wavelengths": 4.5, "contrast": 0.21}, "wavelengths must be at most 3.64 on 8 pixels at contrast 0.21, got 4.5"),
        ({"solver": "lsqr"}, "solver must be one of direct, deepinv, got 'lsqr'"),
        ({"model": "rytov"}, "model must be one of born, lippmann_schwinger, got 'rytov'"),
        ({"noise_std": 0.0}, "noise_std must be finite and above 0, got 0.0"),
        ({"shape": (1, 8, 6)}, r"shape must be \(1, n, n\), got \(1, 8, 6\)"),
        ({"shape": (3, 8, 8)}, r"shape must be \(1, n, n\), got \(3, 8, 8\)"),
    ],
)
def test_bad_arguments_get_one_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        InverseScattering(**({"shape": SHAPE} | arguments))


def test_a_y_of_another_shape_is_refused(name):
    with pytest.raises(ValueError, match=r"y must have shape \(B, 3, 5, 2\), got \(1, 3, 5\)"):
        PROBLEMS[name]().check_y(torch.zeros(1, 3, 5))
