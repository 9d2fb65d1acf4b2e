"""The solver against closed forms and scipy's integrator; the random field's covariance; the task."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from priors import RandomField
from rtb_inverse import Posterior
from rtb_inverse.laplace import LaplaceGuidance
from tasks import NavierStokes
from tasks.navier_stokes import Flow

D = torch.float64


def grid(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.meshgrid(*torch.arange(n, dtype=D).mul(2 * math.pi / n).expand(2, n), indexing="ij")


def field(n: int, generator, highest: int = 3) -> torch.Tensor:
    prior = RandomField(n, highest, dtype=D)
    return prior.decode(prior.sample(2, generator))


def test_taylor_green_vortices_only_decay():
    X, Y = grid(16)
    w = (2 * X.cos() * Y.cos())[None, None]
    torch.testing.assert_close(Flow(16, 0.05, 1.5, 10)(w), w * math.exp(-2 * 0.05 * 1.5), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("forcing", [0.0, 0.5])
def test_against_an_integrator_on_its_own(forcing, generator):
    """The same equation written with full complex transforms, in scipy's adaptive Runge-Kutta."""
    n, nu, T = 16, 0.02, 1.0
    w = field(n, generator)[:1]
    k = np.fft.fftfreq(n, 1 / n)
    K, L = k[:, None], k[None, :]
    square = K**2 + L**2
    kept = (abs(K) < n / 3) & (abs(L) < n / 3)
    X, Y = (c.numpy() for c in grid(n))

    def slope(_, flat):
        W = np.fft.fft2(flat.reshape(n, n))
        psi = W / np.where(square == 0, np.inf, square)
        u, v, w_x, w_y = (np.fft.ifft2(c).real for c in (1j * L * psi, -1j * K * psi, 1j * K * W, 1j * L * W))
        moved = np.fft.ifft2(kept * np.fft.fft2(u * w_x + v * w_y)).real
        return (-moved - nu * np.fft.ifft2(square * W).real + forcing * (np.sin(X + Y) + np.cos(X + Y))).ravel()

    expected = solve_ivp(slope, (0, T), w.numpy().ravel(), rtol=1e-9, atol=1e-10).y[:, -1].reshape(n, n)
    got = Flow(n, nu, T, 40, forcing)(w)[0, 0]
    assert float((got - torch.from_numpy(expected)).abs().max()) < 1e-5


def test_fourth_order_in_the_step(generator):
    w = field(16, generator)
    fine = Flow(16, 0.01, 1.0, 160)(w)
    errors = [float((Flow(16, 0.01, 1.0, steps)(w) - fine).abs().max()) for steps in (10, 20)]
    assert 10 < errors[0] / errors[1] < 24  # 2^4 = 16


def test_the_flow_moves_with_a_shift_and_keeps_enstrophy(generator):
    w = field(16, generator)
    flow = Flow(16, 0.01, 1.0, 10)
    torch.testing.assert_close(flow(w.roll((3, 5), (-2, -1))), flow(w).roll((3, 5), (-2, -1)))
    before = field(48, generator)
    after = Flow(48, 1e-9, 0.3, 40)(before)  # nearly no viscosity, and enough frequencies
    torch.testing.assert_close(after.square().mean((1, 2, 3)), before.square().mean((1, 2, 3)), rtol=1e-3, atol=0)


def test_the_field_has_the_covariance_of_its_spectrum():
    n, highest, scale = 12, 3, 0.7
    modes = RandomField(n, highest, scale, smoothness=2.0, variance=1.7, dtype=D).generator.modes.flatten(1)
    C = modes.T @ modes
    k = torch.fft.fftfreq(n, 1 / n, dtype=D)
    kept = (k[:, None].abs() <= highest) & (k.abs() <= highest) & ((k[:, None] != 0) | (k != 0))
    power = torch.where(kept, (scale**-2 + k[:, None] ** 2 + k**2) ** -2.0, 0.0)
    row = torch.fft.ifft2(power).real
    torch.testing.assert_close(C[0].reshape(n, n), 1.7 * row / row[0, 0])
    torch.testing.assert_close(C.diagonal(), torch.full((n * n,), 1.7, dtype=D))


def test_the_task(generator):
    problem = NavierStokes((1, 16, 16), time=1.0, steps=8, factor=2)
    prior = RandomField(16, steps=10)
    x = prior.decode(prior.sample(3, generator))
    clean = problem(x)
    assert clean.shape == (3, 1, 8, 8) and not problem.linear
    torch.testing.assert_close(clean, problem.flow(x)[..., ::2, ::2])
    torch.testing.assert_close(problem(x[1:2]), clean[1:2], rtol=1e-4, atol=1e-5)
    again = NavierStokes.from_config(problem.config, {})
    assert torch.equal(again(x), clean)
    posterior = Posterior(prior, problem, width=16)
    assert isinstance(posterior.guide, LaplaceGuidance) and posterior.references is None
    draws = posterior.sample(problem.simulate(x, generator), 4, generator)
    assert draws.x.shape == (4, 3, 1, 16, 16)


@pytest.mark.parametrize("n", [8, 16])
def test_condition_interpolates_the_sensors(n):
    X, Y = grid(32)
    w = ((X + 2 * Y).sin() + 0.5 * (Y - X).cos() + 0.2)[None, None]
    problem = NavierStokes((1, 32, 32), factor=32 // n)
    torch.testing.assert_close(problem.condition(w[..., :: 32 // n, :: 32 // n]), w)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"shape": (1, 16, 8)}, "shape"), ({"shape": (3, 16, 16)}, "shape"), ({"shape": (1, 4, 4)}, "shape"), ({"factor": 5}, "factor"),
        ({"factor": 0}, "factor"), ({"time": 0.0}, "time"), ({"viscosity": -1e-3}, "viscosity"), ({"steps": 0}, "steps"),
        ({"noise_std": 0.0}, "std"), ({"forcing": math.inf}, "forcing"), ({"time": 500.0, "steps": 2}, "finite"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        NavierStokes(**({"shape": (1, 16, 16), "factor": 2} | arguments))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"highest": 8}, "highest"), ({"highest": 0}, "highest"), ({"length_scale": 0.0}, "length_scale"), ({"variance": -1.0}, "variance"),
     ({"n": 0}, "n must")],
)  # fmt: skip
def test_bad_fields(arguments, named):
    with pytest.raises(ValueError, match=named):
        RandomField(**({"n": 16} | arguments))
