r"""Strong gravitational lensing: a source galaxy behind a lens of known mass, seen as arcs or as a ring,

    y = P B L (x - sky) + noise_std n,      (L x)_i = x(beta_i),      beta_i = theta_i - alpha(theta_i),      n ~ N(0, I).

The ray that arrives from theta_i on the sky left the source plane at beta_i, with the same surface brightness: so L is the bilinear
interpolation of the source between its pixels. alpha is the deflection by a singular isothermal ellipsoid (Kormann, Schneider and
Bartelmann 1994) and an external shear; caustics gives it. B is the convolution with a Gaussian point-spread function, on the grid of rays,
and P the mean over the rays of each detector pixel. A = P B L is one sparse matrix, made once.

Positions are in arcsec: theta_1 and beta_1 grow with the column, theta_2 and beta_2 with the row; 0 is the middle of either field of view.
"""

import math

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from rtb_inverse.checks import check_count, check_number, check_positive
from rtb_inverse.guidance import DENSE_LIMIT, conjugate_gradients
from tasks.linear import LinearTask, check_ratio, image_shape

LENS = ("einstein_radius", "axis_ratio", "angle", "centre", "shear")  # what says which lens it is, of `Lensing`'s arguments
REACH = 4  # standard deviations at which the point-spread function ends


def check_pair(name: str, value) -> tuple[float, float]:
    """`value` as two finite floats; ValueError otherwise."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name} must be two finite numbers, got {value!r}")
    return check_number(f"first element of {name}", value[0]), check_number(f"second element of {name}", value[1])


def shoot(theta: Tensor, einstein_radius, axis_ratio, angle, centre, shear) -> Tensor:
    """beta = theta - alpha(theta), (R, 2), for rays theta (R, 2), float64; for lenses (see `Lensing`) of parameters (B, 1), those of a
    pair too, (B, R, 2). NaN at the very centre of a lens."""
    from caustics.lenses import func

    q, phi, b, *pairs = (torch.as_tensor(value, dtype=torch.float64) for value in (axis_ratio, angle, einstein_radius, *centre, *shear))
    x0, y0, g1, g2 = pairs
    ellipsoid = func.reduced_deflection_angle_sie(x0, y0, q, phi, b, *theta.unbind(-1))
    outside = func.reduced_deflection_angle_external_shear(x0, y0, g1, g2, *theta.unbind(-1))
    return theta - torch.stack(ellipsoid, -1) - torch.stack(outside, -1)


def critical_curve(fov: float, **lens) -> tuple[Tensor, Tensor]:
    """Where the magnification is infinite, (R, 2) [arcsec], the longest curve within the field of view; and what its rays see, the
    caustic. ValueError: a field of view that does not hold it whole."""
    from matplotlib.figure import Figure

    axis = torch.linspace(-fov, fov, 401, dtype=torch.float64) / 2
    beta = shoot(torch.cartesian_prod(axis, axis), **lens).reshape(401, 401, 2)
    (a, b), (c, d) = (torch.gradient(beta[..., k], spacing=(axis, axis)) for k in (0, 1))
    curves = Figure().subplots().contour(axis, axis, (a * d - b * c).T, [0]).allsegs[0]
    critical = torch.from_numpy(max(map(np.asarray, curves), key=len)) if curves else axis.new_zeros(1, 2)
    centre, step = torch.tensor(lens["centre"]).to(axis), axis[1] - axis[0]
    closed = (critical[0] - critical[-1]).norm() < step and (critical - centre).norm(dim=1).min() > 4 * step
    if not closed:
        raise ValueError(f"fov must hold the critical curve whole, got {fov:g} about a lens of {lens!r}")
    return critical, shoot(critical, **lens)


def corners(beta: Tensor, n: int, fov: float) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation between the middles of n x n pixels at beta (*batch, R, 2) [arcsec]: the four pixels about each ray and their
    weights, (4, *batch, R); 0 outside the field of view and at NaN. The outer half of a border pixel has its value."""
    inside = (beta.abs() <= fov / 2).all(-1)
    at = torch.where(inside[..., None], beta / fov * n + (n - 1) / 2, 0).clamp(0, n - 1)  # in pixels: column, row
    first = at.floor().clamp_max(n - 2)
    corner = torch.tensor([(0, 0), (0, 1), (1, 0), (1, 1)]).to(beta).reshape(4, *(1,) * (beta.ndim - 1), 2)
    pixel = first + corner
    return (pixel[..., 1] * n + pixel[..., 0]).long(), (1 - (at - pixel).abs()).prod(-1) * inside


def interpolation(beta: Tensor, n: int, fov: float) -> sparse.csr_array:
    """L, (R, n n), of the `corners` of rays beta (R, 2)."""
    pixel, weight = corners(beta, n, fov)
    ray, seen = torch.arange(len(beta)).expand(4, -1), weight > 0
    return sparse.csr_array((weight[seen].numpy(), (ray[seen].numpy(), pixel[seen].numpy())), shape=(len(beta), n * n))


def detector(m: int, supersample: int, fov: float, psf_fwhm: float) -> tuple[sparse.csr_array, Tensor]:
    """P B along one axis, (m, r), and the r r rays theta, (r r, 2) [arcsec], row by row: the mean over the rays of each pixel, after a
    Gaussian of sum 1, cut off at `REACH` standard deviations, for which the rays go on so far beyond the m pixels."""
    step = fov / (m * supersample)
    sigma = psf_fwhm / math.sqrt(8 * math.log(2)) / step
    pad = math.ceil(REACH * sigma)
    kernel = np.exp(-0.5 * (np.arange(-pad, pad + 1) / sigma) ** 2) if pad else np.ones(1)
    response = np.convolve(np.full(supersample, 1 / supersample), kernel / kernel.sum())
    PB = np.stack([np.pad(response, (i * supersample, (m - 1 - i) * supersample)) for i in range(m)])
    axis = (torch.arange(PB.shape[1], dtype=torch.float64) - (PB.shape[1] - 1) / 2) * step
    return sparse.csr_array(PB), torch.cartesian_prod(axis, axis).flip(1)


class LensedImage(nn.Module):
    """P B L (x - sky), (M, 1, n, n) to (M, 1, m, m)."""

    indices: Tensor
    values: Tensor

    def __init__(self, matrix: sparse.csr_array, n: int, m: int, sky: float):
        super().__init__()
        self.n, self.m, self.sky, coo = n, m, sky, matrix.tocoo()
        device = torch.get_default_device()
        self.register_buffer("indices", torch.from_numpy(np.stack(coo.coords)).to(device, torch.long), persistent=False)
        self.register_buffer("values", torch.from_numpy(coo.data).to(device, torch.float32), persistent=False)

    def sparse(self, dtype: torch.dtype) -> Tensor:
        """A, (m m, n n)."""
        values, size = self.values.to(dtype), (self.m**2, self.n**2)
        return torch.sparse_coo_tensor(self.indices, values, size, is_coalesced=True, check_invariants=False, device=values.device)

    def product(self, x: Tensor) -> Tensor:
        """A x, without the sky."""
        return (self.sparse(x.dtype) @ x.flatten(1).T.contiguous()).T.reshape(len(x), 1, self.m, self.m)

    def pull(self, y: Tensor) -> Tensor:
        """A^T y, (M, 1, m, m) to (M, 1, n, n)."""
        return (self.sparse(y.dtype).T @ y.flatten(1).T).T.reshape(len(y), 1, self.n, self.n)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x - self.sky)


class Lensing(LinearTask):
    """y = P B L (x - sky) + noise_std n, (B, 1, m, m), in units of x: surface brightness above that of the sky.

    Args:
        shape: of x, (1, n, n), n at least 2.
        pixels: m, of the image along each side.
        einstein_radius: of the lens [arcsec], > 0.
        axis_ratio: of its isodensity ellipses, in (0, 1]; 1 is the singular isothermal sphere.
        angle: of their major axis, from that of columns to that of rows [rad].
        centre: of the lens (theta_1, theta_2) [arcsec].
        shear: (g_1, g_2), of modulus below 1: the deflection (g_1 theta_1 + g_2 theta_2, g_2 theta_1 - g_1 theta_2) about the centre.
        source_fov, image_fov: widths of the two fields of view [arcsec], > 0. Outside its own, the source is sky.
        psf_fwhm: full width of the point-spread function at half of its maximum [arcsec], at least 0: none.
        supersample: rays per pixel along each side.
        noise_std: standard deviation of the noise, > 0.
        sky: the value of x where there is no light: -1 for priors of images in [-1, 1] on black, 0 for a process of mean 0.

    Raises:
        ValueError: an argument out of these ranges, or not finite.
    """

    operator: LensedImage

    def __init__(
        self, shape, pixels: int = 32, einstein_radius: float = 1.0, axis_ratio: float = 0.75, angle: float = 0.6, centre=(0.0, 0.0),
        shear=(0.03, -0.02), source_fov: float = 1.2, image_fov: float = 3.2, psf_fwhm: float = 0.15, supersample: int = 3,
        noise_std: float = 0.05, sky: float = 0.0,
    ):  # fmt: skip
        shape = image_shape(shape, (1,), square=True)
        n, m, s = check_count("sizes in shape", shape[-1], 2), check_count("pixels", pixels), check_count("supersample", supersample)
        source_fov, image_fov = check_positive("source_fov", source_fov), check_positive("image_fov", image_fov)
        psf_fwhm = check_number("psf_fwhm", psf_fwhm, 0)
        centre, shear = check_pair("centre", centre), check_pair("shear", shear)
        if math.hypot(*shear) >= 1:
            raise ValueError(f"shear must be of modulus below 1, got {shear!r}")
        lens = {
            "einstein_radius": check_positive("einstein_radius", einstein_radius), "angle": check_number("angle", angle),
            "axis_ratio": float(check_ratio("axis_ratio", axis_ratio)), "centre": centre, "shear": shear,
        }  # fmt: skip

        with torch.device("cpu"):  # where scipy is
            PB, theta = detector(m, s, image_fov, psf_fwhm)
            A = sparse.kron(PB, PB, format="csr") @ interpolation(shoot(theta, **lens), n, source_fov)
        A.sort_indices()
        if not A.count_nonzero():
            views = f"source_fov {source_fov:g} and image_fov {image_fov:g}"
            raise ValueError(f"lens must show some of the source, within {views}, got {lens!r}")

        sky = check_number("sky", sky)
        super().__init__(
            LensedImage(A, n, m, sky), shape, noise_std, pixels=m, **lens, source_fov=source_fov, image_fov=image_fov,
            psf_fwhm=psf_fwhm, supersample=s, sky=sky,
        )  # fmt: skip

    @property
    def matrix(self) -> Tensor:
        """A = P B L, dense, (m m, n n)."""
        return self.operator.sparse(self.operator.values.dtype).to_dense()

    @property
    def sensitivity(self) -> Tensor:
        """How much light of each pixel of the source arrives, (1, n, n): the norms of A's columns, relative to the largest."""
        square = self.operator.values.new_zeros(self.shape.numel()).index_add_(0, self.operator.indices[1], self.operator.values**2)
        return (square / square.max()).sqrt().reshape(self.shape)

    def condition(self, y):
        """On the source's grid, (B, 2, n, n): the mean of a white x ~ N(sky, I) given y, sky + (A^T A + noise_std^2)^{-1} A^T y, and the
        sensitivity. By a matrix, made when it is first asked for, or, where that is too large, by a few conjugate gradients."""
        back, variance, A = self.operator.pull(y), (self.condition_level * self.noise.std.to(y.dtype)) ** 2, self.operator
        if self.shape.numel() ** 2 > DENSE_LIMIT:
            x = conjugate_gradients(lambda v: A.pull(A.product(v)) + variance * v, back, self.iterations)
        else:
            if self.inverse is None:
                square = self.matrix.double().T @ self.matrix.double()
                square.diagonal().add_((self.condition_level * self.noise.std.double()) ** 2)
                self.inverse = torch.linalg.inv(square).to(A.values.dtype)
            x = (back.flatten(1) @ self.inverse.to(y.dtype)).reshape(back.shape)
        return torch.cat([x + A.sky, self.sensitivity.to(y.dtype).expand(len(y), -1, -1, -1)], 1)
