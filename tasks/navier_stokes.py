r"""Fluid dynamics: where did this flow come from? The vorticity w of an incompressible fluid on the torus [0, 2 pi)^2,

    dw/dt + u . grad w = nu lap w + f,      u = (d psi / dy, - d psi / dx),      - lap psi = w,

is observed at time T, on a coarse grid, with noise; x is w at time 0. Pseudo-spectral in space (products on the grid, the upper third of
the frequencies cut off against aliasing); in time Runge-Kutta of order 4, with a fixed step, of w exp(nu k^2 t), for which the viscous
part is solved exactly.
"""

import math

import torch
from torch import Tensor, nn

from rtb_inverse.checks import check_count, check_number, check_positive, one_number
from rtb_inverse.problems import GaussianNoise, InverseProblem
from tasks.linear import image_shape


class Flow(nn.Module):
    """w at time 0 to w at time T, (M, 1, n, n) both; differentiable, in the dtype of w.

    Args:
        n: grid points along each axis. viscosity: nu > 0. time: T > 0. steps: of Runge-Kutta. forcing: strength of f.
    """

    k: Tensor
    l: Tensor
    inverse: Tensor
    kept: Tensor
    decay: Tensor
    force: Tensor

    def __init__(self, n: int, viscosity: float, time: float, steps: int, forcing: float = 0.0):
        super().__init__()
        self.n, self.dt, self.steps = n, time / steps, steps
        k = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)[:, None]
        l = torch.fft.rfftfreq(n, 1 / n, dtype=torch.float64)
        square = k**2 + l**2
        kept = (k.abs() < n / 3) & (l < n / 3)
        X, Y = torch.meshgrid(*torch.arange(n, dtype=torch.float64).mul(2 * math.pi / n).expand(2, n), indexing="ij")
        force = torch.fft.rfft2(forcing * ((X + Y).sin() + (X + Y).cos()))
        inverse = torch.where(square > 0, 1 / square.clamp_min(1), 0.0)  # of - lap
        decay = torch.exp(-viscosity * square * self.dt / 2)  # over half a step
        tables = {"k": k, "l": l, "inverse": inverse, "kept": kept.double(), "decay": decay, "force": force}
        for name, value in tables.items():
            self.register_buffer(name, value, persistent=False)

    def advection(self, w: Tensor) -> Tensor:
        """- u . grad w + f, all as Fourier coefficients (M, n, n // 2 + 1)."""
        k, l = 1j * self.k.to(w.real.dtype), 1j * self.l.to(w.real.dtype)
        psi = self.inverse.to(w.real.dtype) * w
        u, v, w_x, w_y = torch.fft.irfft2(torch.stack([l * psi, -k * psi, k * w, l * w]), s=(self.n, self.n))
        return self.force.to(w.dtype) - self.kept.to(w.real.dtype) * torch.fft.rfft2(u * w_x + v * w_y)

    def forward(self, x: Tensor) -> Tensor:
        w, dt, half = torch.fft.rfft2(x[:, 0]), self.dt, self.decay.to(x.dtype)
        for _ in range(self.steps):
            k1 = self.advection(w)
            k2 = self.advection(half * (w + dt / 2 * k1))
            k3 = self.advection(half * w + dt / 2 * k2)
            k4 = self.advection(half * (half * w + dt * k3))
            w = half * (half * (w + dt / 6 * k1) + dt / 3 * (k2 + k3)) + dt / 6 * k4
        return torch.fft.irfft2(w, s=(self.n, self.n))[:, None]


class NavierStokes(InverseProblem):
    """y = every `factor`-th point of w(T) + noise_std n, (B, 1, n / factor, n / factor).

    Args:
        shape: of x, the vorticity at time 0, (1, n, n), n >= 8, on [0, 2 pi)^2, in units of one over time.
        time: T > 0. viscosity: nu > 0, in units of length^2 / time; of x of size 1 the Reynolds number is about 1 / nu.
        factor: grid points from one sensor to the next; divides n.
        steps: of the solver, at least 1; a step must not cross more than about a grid cell (there: T max |u| / steps < 2 pi / n).
        forcing: strength of the steady force sin(X + Y) + cos(X + Y).
        noise_std: standard deviation of the noise, > 0, in the units of w.

    Raises:
        ValueError: a shape that is not (1, n, n), a factor that does not divide n, time, viscosity or noise_std <= 0; a solution that
            leaves the finite numbers (too few steps).
    """

    def __init__(
        self, shape=(1, 32, 32), time: float = 2.0, viscosity: float = 1e-2, factor: int = 4, steps: int = 20, forcing: float = 0.0,
        noise_std: float = 0.05,
    ):  # fmt: skip
        shape = image_shape(shape, (1,), square=True)
        if shape[1] < 8:
            raise ValueError(f"shape must be (1, n, n), n at least 8, got {tuple(shape)}")
        if shape[1] % check_count("factor", factor):
            raise ValueError(f"factor must divide n = {shape[1]}, got {factor}")
        time, viscosity, forcing = check_positive("time", time), check_positive("viscosity", viscosity), check_number("forcing", forcing)
        noise_std = one_number("noise_std", noise_std)
        super().__init__(self.observed, GaussianNoise(noise_std), linear=False)
        self.flow, self.factor = Flow(shape[1], viscosity, time, check_count("steps", steps), forcing), factor
        self.config = {
            "shape": list(shape), "time": time, "viscosity": viscosity, "factor": factor, "steps": steps, "forcing": forcing,
            "noise_std": float(noise_std),
        }  # fmt: skip
        self.bind(shape)

    def observed(self, x: Tensor) -> Tensor:
        """w(T) at the sensors, (M, 1, n, n) to (M, 1, n / factor, n / factor)."""
        return self.flow(x)[..., :: self.factor, :: self.factor]

    def condition(self, y):
        """w(T), interpolated between the sensors by its Fourier coefficients, (B, 1, n, n)."""
        n, low = self.shape[-1], torch.fft.rfft2(y)
        top = (n // self.factor + 1) // 2  # without the highest frequency of an even number of sensors, which has no sign
        kept = torch.arange(1 - top, top, device=y.device)  # along the first axis, where negative ones count from the end
        full = low.new_zeros((*y.shape[:-2], n, n // 2 + 1))
        full[..., kept, :top] = low[..., kept, :top]
        return torch.fft.irfft2(full * self.factor**2, s=(n, n))

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "NavierStokes":
        """Rebuild from `config`."""
        return cls(**config)
