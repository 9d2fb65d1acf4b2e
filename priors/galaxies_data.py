r"""Simulated galaxies, (1, size, size) in [-1, 1]: what a prior of sources is trained on without any survey's images.

Every galaxy is a bulge, a disc with spiral arms and star-forming clumps, and perhaps companions, on a field of view of half-width 1. Each
smooth part has the surface brightness of Sérsic, here of unit flux,

    I(r) = exp(-b_n ((r / r_e)^{1/n} - 1)) / F,      F = 2 pi n q r_e^2 e^{b_n} b_n^{-2n} Gamma(2n),      b_n = 2n - 1/3 + 4/(405 n),

with r the elliptical radius of axis ratio q, and r_e that of half the light. A disc is exponential (n = 1); seen at inclination i its axis
ratio is q^2 = cos^2 i + 0.15^2 sin^2 i. In its own plane, at radius R and azimuth phi, the arms multiply it by

    1 + A(R) (exp(kappa (cos psi - 1)) / (e^{-kappa} I_0(kappa)) - 1),      psi = m (phi - ln R / tan(pitch)) + phase + ripples(R, phi),

which is 1 on average along every circle. What is shown is asinh(I / softening), so that discs are seen beside bright centres.
(Sérsic 1963; Graham and Driver 2005, arXiv astro-ph/0503176.)
"""

import math

import torch
from torch import Generator, Tensor

from priors.simulated import Draws, SimulatedData, in_parts
from rtb_inverse.checks import check_count

FINE = 2  # samples per pixel and axis
CLUMPS, COMPANIONS = 60, 2
SOFTENING = 0.025  # of the brightest pixel, in the asinh
THICKNESS = 0.15  # axis ratio of a disc seen edge-on
CORE = 0.02  # smallest radius that matters: no infinite cusps


def image(parameter: Tensor) -> Tensor:
    """(n, ...) to (n, ..., 1, 1), to broadcast over pixels."""
    return parameter[..., None, None]


def turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates along axes that are turned by `angle`."""
    c, s = angle.cos(), angle.sin()
    return c * x + s * y, c * y - s * x


def sersic(x: Tensor, y: Tensor, n: Tensor, r_e: Tensor, q: Tensor, angle: Tensor) -> Tensor:
    """I at x, y (..., h, w) from the centre, of index n, half-light radius r_e, axis ratio q and position angle, (...) each: flux 1."""
    b = 2 * n - 1 / 3 + 4 / (405 * n)
    log_flux = (2 * math.pi * n * q * r_e**2).log() + b - 2 * n * b.log() + torch.lgamma(2 * n)
    along, across = turned(x, y, image(angle))
    r = (along**2 + (across / image(q)) ** 2 + CORE**2).sqrt()
    return (-image(b) * ((r / image(r_e)) ** image(1 / n) - 1) - image(log_flux)).exp()


class Disc:
    """An exponential disc with m arms and clumps along them, seen at some inclination."""

    def __init__(self, draws: Draws, arms: Tensor):
        """`arms` (n,): 1 where there are arms and clumps, else 0."""
        uniform = draws.uniform
        self.r_e = draws.log_uniform(0.28, 0.5)
        self.h = self.r_e / 1.678
        self.cos = torch.where(arms > 0, uniform(0.25, 1), uniform(0.05, 1))  # an edge-on disc hides its arms
        self.q = (self.cos**2 + THICKNESS**2 * (1 - self.cos**2)).sqrt()
        self.angle = uniform(0, math.pi)
        self.m = torch.multinomial(torch.tensor([0.65, 0.2, 0.15]), draws.n, True, generator=draws.generator) + 2.0
        winding = 1 / torch.deg2rad(uniform(14, 36)).tan()
        self.winding = winding * (2 * draws.chance(0.5) - 1)
        self.phase = uniform(0, 2 * math.pi)
        self.kappa, self.contrast, self.inner = uniform(1, 3), arms * uniform(0.45, 0.95), uniform(0.3, 0.9) * self.h
        self.ripple = uniform(0, 0.45, 1) * draws.normal(3)
        self.waves, self.ripple_phase = 2 * draws.normal(3), uniform(0, 2 * math.pi, 3)
        self.clump_share = arms * uniform(0, 1) ** 2 * 0.35
        self.clump_R = -image(self.h)[..., 0] * uniform(1e-4, 1, CLUMPS, 2).log().sum(-1)  # density R exp(-R / h), as the disc's
        self.clump_arm = torch.floor(uniform(0, 1, CLUMPS) * self.m[:, None])
        self.clump_scatter = 0.35 * draws.normal(CLUMPS)
        self.clump_flux = torch.softmax(1.1 * draws.normal(CLUMPS), -1)
        self.clump_size = draws.log_uniform(0.02, 0.06, CLUMPS)

    def brightness(self, x: Tensor, y: Tensor) -> Tensor:
        """Disc and arms, (n, h, w), of flux 1."""
        smooth = sersic(x, y, torch.ones_like(self.q), self.r_e, self.q, self.angle)
        along, across = turned(x, y, image(self.angle))
        across = across / image(self.cos.clamp_min(THICKNESS))
        log_R, phi = (along**2 + across**2 + CORE**2).sqrt().log(), torch.atan2(across, along)
        psi = image(self.m) * (phi - image(self.winding) * log_R) + image(self.phase)
        for k in range(3):
            wave = (k + 1) * phi + image(self.waves[:, k]) * log_R + image(self.ripple_phase[:, k])
            psi = psi + image(self.ripple[:, k]) * wave.cos()
        arm = (image(self.kappa) * (psi.cos() - 1)).exp() / image(torch.special.i0e(self.kappa))
        open_ = -torch.expm1(-((log_R.exp() / image(self.inner)) ** 2))  # arms start outside the centre
        return smooth * (1 + image(self.contrast) * open_ * (arm - 1))

    def clumps(self, axis: Tensor, centre: Tensor) -> Tensor:
        """Round Gaussian clumps on the arms, (n, h, w), of flux 1; rows and columns lie at `axis` (h,), the galaxy at `centre` (n, 2)."""
        R = self.clump_R + CORE
        phi = self.winding[:, None] * R.log() + (2 * math.pi * self.clump_arm - self.phase[:, None]) / self.m[:, None] + self.clump_scatter
        x, y = turned(R * phi.cos(), R * phi.sin() * self.cos[:, None], -self.angle[:, None])

        def line(at):
            return (-0.5 * ((axis - at[..., None]) / self.clump_size[..., None]) ** 2).exp()

        weight = self.clump_flux / (2 * math.pi * self.clump_size**2)
        return torch.einsum("nk,nkh,nkw->nhw", weight, line(y + centre[:, 1:]), line(x + centre[:, :1]))


def intensity(draws: Draws, size: int) -> Tensor:
    """Surface brightness of n galaxies, (n, size, size), of flux about 1 on the field of view."""
    fine = FINE * size
    axis = (2 * torch.arange(fine) + 1) / fine - 1
    centre = 0.08 * draws.normal(2)
    x, y = axis - image(centre[:, 0]), axis[:, None] - image(centre[:, 1])

    kind = draws.uniform(0, 1)
    elliptical, arms = kind < 0.25, (kind > 0.4).float()
    disc = Disc(draws, arms)
    share = torch.where(elliptical, 1.0, torch.where(arms > 0, draws.uniform(0, 1) ** 2 * 0.4 + 0.04, draws.uniform(0.1, 0.7)))
    n = torch.where(elliptical, draws.uniform(2, 5), draws.uniform(1, 3))
    r_e = torch.where(elliptical, draws.log_uniform(0.18, 0.45), disc.r_e * draws.uniform(0.12, 0.3))
    q = torch.where(elliptical, draws.uniform(0.45, 1), disc.q + (1 - disc.q) * draws.uniform(0.4, 0.9))
    I = image(share) * sersic(x, y, n, r_e, q, disc.angle)
    c = image(disc.clump_share)
    I = I + image(1 - share) * ((1 - c) * disc.brightness(x, y) + c * disc.clumps(axis, centre))

    distance, where = draws.uniform(0.4, 0.95, COMPANIONS), draws.uniform(0, 2 * math.pi, COMPANIONS)
    flux = draws.chance(0.22, COMPANIONS) * draws.log_uniform(0.02, 0.3, COMPANIONS)
    x, y = x[:, None] - image(distance * where.cos()), y[:, None] - image(distance * where.sin())
    shape = draws.uniform(1, 2.5, COMPANIONS), draws.log_uniform(0.05, 0.12, COMPANIONS), draws.uniform(0.4, 1, COMPANIONS)
    I = I + (image(flux) * sersic(x, y, *shape, draws.uniform(0, math.pi, COMPANIONS))).sum(1)
    return torch.nn.functional.avg_pool2d(I[:, None], FINE)[:, 0]


def galaxies(n: int, generator: Generator | None = None, size: int = 32) -> Tensor:
    """n galaxies, (n, 1, size, size) float32: the sky near -1, the brightest pixel of each between 0.58 and 1.

    Of a field of view of width 2 (four to eleven half-light radii): 25 % ellipticals (index 2 to 5, r_e 0.18 to 0.45, axis ratio 0.45 to
    1); 15 % smooth discs at any inclination, their bulge with 10 to 70 % of the light; 60 % spirals (2 to 4 arms of pitch 14 to 36 degrees,
    more or less ragged; up to 35 % of the disc's light in clumps; a bulge of 4 to 44 % of the light). Discs have r_e 0.28 to 0.5, bulges 12
    to 30 % of that and index 1 to 3. Any position angle; centres scatter by 0.08. Each of two possible companions is there with probability
    0.22, with 2 to 30 % of the flux. The brightest pixel varies by a factor of 2.5 before the asinh.

    Raises:
        ValueError: n or size below 1.
    """
    check_count("n", n), check_count("size", size)

    def make(count: int) -> Tensor:
        draws = Draws(count, generator)
        I = intensity(draws, size)
        I = I / I.amax((1, 2), keepdim=True) * image(draws.log_uniform(0.4, 1))
        return 2 * (I / SOFTENING).asinh() / math.asinh(1 / SOFTENING) - 1

    return in_parts(n, make)[:, None]


class GalaxyData(SimulatedData):
    """`galaxies`, for training a prior."""

    make = staticmethod(galaxies)
