r"""Inverse scattering: plane waves from several directions go through an object, and the scattered field is recorded around it. With the
contrast f = (k(r) / k)^2 - 1, at pixels r, and waves of time dependence exp(-i omega t), the total field u of the incident v obeys
(Lippmann and Schwinger)

    u = v + g f u,        y = G f u + noise,        f = contrast (x + 1) / 2,

so that y = G f (I - g f)^{-1} v: nonlinear, since waves that were scattered are scattered again. Born leaves that out, u = v, for f << 1.
g and G are the integral of k^2 (i / 4) H_0(k |r - r'|) over a pixel, taken as a disc of the same area, of radius a (Richmond 1965):

    (i pi k a / 2) J_1(k a) H_0(k |r - r'|)        elsewhere, and        (i pi k a / 2) H_1(k a) - 1        in its own middle,

with the Hankel functions H of the first kind. Lengths are in widths of the image.

Two ways to the field. `solver="direct"` is this, with one LU decomposition for all waves of an image. `solver="deepinv"` is the
Scattering of deepinv: its Green's functions (g in Fourier space, by the method of Vico, Greengard and Ferrando 2016), its Born operator,
and its iterations (LSQR). It has its pixels' middles at ours, but g as if they were closer by (n - 1) / n; the contrast makes up for the
area. The field of a cylinder is then 1 to 4 times as far from Mie's series as that of "direct" (n = 8: .05 and .05, n = 24: .017 and .005
at one wavelength, .08 and .02 at two), and takes 30 to 150 times as long. Where a frequency of its grid is that of the waves, which it
cannot compute, these have 1 + 1e-5 of it.
"""

import math

import torch
from scipy.special import hankel1, j1
from torch import Tensor

from rtb_inverse.checks import check_choice, check_count, check_positive, one_number
from rtb_inverse.noise import ComplexGaussianNoise
from rtb_inverse.problems import InverseProblem
from tasks.linear import image_shape

RADIUS = 1.0  # of the circle of receivers about the middle of the image, whose corners are at 0.71
TOLERANCE = 1e-9  # of deepinv's iterations, which end together for all images of a batch
AT_ONCE = 2**25  # elements of the systems that are solved together
LARGE = 128  # unknowns beyond which a system is solved alone: of several that large, torch with threads that were set may get any wrong


def on_circle(m: int) -> Tensor:
    """m points of the unit circle at equal distances, from (1, 0) on, (m, 2), float64."""
    angle = 2 * math.pi * torch.arange(m, dtype=torch.float64) / m
    return torch.stack([angle.cos(), angle.sin()], -1)


def scattering_matrices(n: int, k: float, receivers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g (n n, n n) and G (R, n n), complex128, and the middles of the pixels (n n, 2), row by row: the first coordinate grows with the
    column, the second falls with the row."""
    axis = (torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5
    pixels = torch.cartesian_prod(-axis, axis).flip(1)
    a = 1 / (n * math.sqrt(math.pi))
    factor = 0.5j * math.pi * k * a
    own = torch.eye(n * n, dtype=torch.bool)
    g = factor * j1(k * a) * torch.from_numpy(hankel1(0, k * torch.cdist(pixels, pixels).masked_fill(own, 1.0).numpy()))
    G = factor * j1(k * a) * torch.from_numpy(hankel1(0, k * torch.cdist(receivers, pixels).numpy()))
    return g.masked_fill(own, complex(factor * hankel1(1, k * a) - 1)), G, pixels


def deepinv_waves(n: int, wavelengths: float, transmitters: Tensor, receivers: Tensor):
    """deepinv's physics."""
    from deepinv.physics import Scattering

    length = (n - 1) / n  # so that its pixels' middles, which lie from edge to edge, are ours
    axis = torch.fft.fftfreq(4 * n, length / n, dtype=torch.float64)
    if float((torch.hypot(axis, axis[:, None]) / wavelengths - 1).abs().min()) < 1e-6:
        wavelengths *= 1 + 1e-5  # its Green's function is 0 / 0 at the frequencies of its grid
    config = Scattering.SolverConfig(tol=TOLERANCE, adjoint_state=False)
    return Scattering(n, receivers.T, transmitters.T, 2 * math.pi * wavelengths, config, length, "plane_wave")


def green(solver, field: Tensor) -> Tensor:
    """g of deepinv's solver times fields (M, T, n, n)."""
    from deepinv.physics.scattering import apply_filter

    return solver.k02 * apply_filter(field, solver.g_fourier)


class TotalField(torch.autograd.Function):
    """u = (I - g f)^{-1} v by deepinv's iterations, of contrasts f (M, 1, n, n) and fields v (M, T, n, n), complex; its derivatives, of all
    orders, are further such fields. (Those of deepinv's own function end at the first, and torch.func does not enter it.)"""

    @staticmethod
    def forward(f, v, solver):
        u, source = v.clone(), solver.k02 * f * v
        there = source.flatten(1).any(1)  # without a source in one image of a batch, deepinv's iterations do not begin for any
        if there.any():
            u[there] += solver(solver.k02 * (1 + f[there]), source[there])
        return u

    @staticmethod
    def setup_context(ctx, inputs, output):
        f, _, ctx.solver = inputs
        ctx.save_for_backward(f, output)
        ctx.save_for_forward(f, output)

    @staticmethod
    def backward(ctx, cotangent):
        f, u = ctx.saved_tensors
        c, solver = cotangent.conj(), ctx.solver
        w = c + f * TotalField.apply(f, green(solver, c), solver)  # (I - f g)^{-1} c, g being symmetric
        return (u * green(solver, w)).sum(1, keepdim=True).conj(), w.conj(), None

    @staticmethod
    def jvp(ctx, df, dv, _):
        f, u = ctx.saved_tensors
        right = (0 if df is None else green(ctx.solver, df * u)) + (0 if dv is None else dv)
        return TotalField.apply(f, right, ctx.solver)


class InverseScattering(InverseProblem):
    """y = G f u + noise_std n, n circular complex Gaussian, as real and imaginary parts, (B, T, R, 2): T plane waves of amplitude 1, whose
    directions of travel are at equal distances from that of the columns on, seen by R receivers on a circle of radius 1.

    By the direct solver, each image's system of n^2 unknowns is one LU decomposition, which takes time as n^6: 8 x 8 is quick, 32 x 32 a
    matter of a second. By either, g is kept, which takes memory as n^4, and the result has derivatives of all orders.

    Args:
        shape: of x, (1, n, n), in [-1, 1]; x = -1 is the medium around.
        transmitters: T, how many plane waves.
        receivers: R.
        contrast: f at x = 1, > 0.
        wavelengths: how many fit into the width of the image, in the medium around, > 0: k = 2 pi wavelengths. In the object they are
            shorter by sqrt(1 + contrast); a half of one is to be no shorter than a pixel.
        model: "lippmann_schwinger", or "born", which is affine in x.
        solver: "direct" or "deepinv" (see above).
        noise_std: E|noise|^2 = noise_std^2, > 0, in units of the incident amplitude.

    Raises:
        ValueError: a shape that is not (1, n, n); another model or solver; T or R below 1; contrast, wavelengths or noise_std <= 0;
            pixels longer than half of a wavelength.
    """

    def __init__(
        self, shape, transmitters: int = 8, receivers: int = 16, contrast: float = 0.5, wavelengths: float = 2.0,
        model: str = "lippmann_schwinger", noise_std: float = 0.02, solver: str = "direct",
    ):  # fmt: skip
        shape = image_shape(shape, (1,), square=True)
        check_choice("model", model, ("born", "lippmann_schwinger")), check_choice("solver", solver, ("direct", "deepinv"))
        T, R = check_count("transmitters", transmitters), check_count("receivers", receivers)
        contrast, wavelengths, n = check_positive("contrast", contrast), check_positive("wavelengths", wavelengths), shape[-1]
        if 2 * wavelengths * math.sqrt(1 + contrast) > n:
            most = n / (2 * math.sqrt(1 + contrast))
            raise ValueError(f"wavelengths must be at most {most:.3g} on {n} pixels at contrast {contrast:g}, got {wavelengths!r}")
        noise_std = one_number("noise_std", noise_std)
        super().__init__(self.scattered, ComplexGaussianNoise(noise_std), linear=model == "born")
        self.model, self.contrast = model, contrast
        self.config = {
            "shape": list(shape), "transmitters": T, "receivers": R, "contrast": contrast, "wavelengths": wavelengths, "model": model,
            "noise_std": float(noise_std), "solver": solver,
        }  # fmt: skip
        k = 2 * math.pi * wavelengths
        self.waves: list = []  # deepinv's physics, no part of the state
        self._hold()
        g, G, pixels = scattering_matrices(n, k, RADIUS * on_circle(R))
        v = torch.exp(1j * k * (pixels @ on_circle(T).T))
        for name, value in {"g": g, "G": G, "v": v}.items():
            self.register_buffer(name, torch.view_as_real(value), persistent=False)
        born = torch.einsum("rp,pt->trp", G, v)
        born = torch.view_as_real(born).movedim(-1, 1).flatten(0, 2)  # of f, real, (2 T R, n n)
        self.step = float(born.square().sum() / (born.T @ born).square().sum())
        self.bind(shape)

    def __getstate__(self):  # deepinv's physics cannot be pickled
        return self.__dict__ | {"waves": []}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._hold()

    def _hold(self) -> None:
        of = self.config
        T, R = of["transmitters"], of["receivers"]
        if of["solver"] == "deepinv":
            self.waves = [deepinv_waves(of["shape"][-1], of["wavelengths"], on_circle(T), RADIUS * on_circle(R))]

    def matrices(self, x: Tensor) -> list[Tensor]:
        """g (n n, n n), G (R, n n) and v (n n, T), complex, as exact as x."""
        return [torch.view_as_complex(self.get_buffer(name).to(x.dtype)) for name in ("g", "G", "v")]

    def scattered(self, x: Tensor) -> Tensor:
        """G f u, (M, 1, n, n) to (M, T, R, 2)."""
        f = self.contrast * (x.flatten(1) + 1) / 2
        if self.waves:
            return self._deepinvs(f.unflatten(1, x.shape[1:]))
        g, G, v = self.matrices(x)
        parts = f.split(1 if len(g) > LARGE else max(1, AT_ONCE // g.numel()))
        return torch.view_as_real(torch.cat([self._field(part, g, v).mT @ G.T for part in parts]))

    def _deepinvs(self, f: Tensor) -> Tensor:
        """G f u of contrasts f (M, 1, n, n), (M, T, R, 2)."""
        physics, n = self.waves[0].to(f.device), f.shape[-1]
        images = (f * (n / (n - 1)) ** 2).to(torch.complex128)
        u = physics.incident_field
        if self.model != "born":
            u = TotalField.apply(images, u.expand(len(f), -1, -1, -1), physics.solver)
        y = physics.compute_field_out(images, u)
        physics.born_operator.total_field = physics.incident_field  # not u, which may be of a function transform
        return torch.view_as_real(y).to(f.dtype)

    def _field(self, f: Tensor, g: Tensor, v: Tensor) -> Tensor:
        """f u of contrasts f (M, n n), (M, n n, T)."""
        if self.model == "born":
            return f[..., None] * v
        identity = torch.eye(len(g), dtype=g.dtype, device=g.device)
        return f[..., None] * torch.linalg.solve(identity - g * f[:, None], v)

    def condition(self, y):
        """Back-projection, 2 / contrast s Re B^H y - 1, (B, 1, n, n), with f -> B f Born's part of the model; s B^H B f is as close to a
        white f as a number s can bring it: a step down the squared residual from the empty medium."""
        _, G, v = self.matrices(y)
        back = torch.einsum("btr,rp,pt->bp", torch.view_as_complex(y.contiguous()), G.conj(), v.conj()).real
        return 2 / self.contrast * self.step * back.reshape(-1, *self.shape) - 1

    def picture(self, y: Tensor) -> Tensor:
        """The modulus of the field, (B, 1, T, R)."""
        return torch.linalg.vector_norm(y, dim=-1)[:, None]

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "InverseScattering":
        """Rebuild from `config`."""
        return cls(**config)
