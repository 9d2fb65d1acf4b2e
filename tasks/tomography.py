r"""Tomography: parallel beams through the image at some angles, y_{sa} = int (x - air) dl along the ray at distance s and angle a.

The image is turned (bilinear interpolation, deepinv's geometry) and summed along its columns. That is a sparse matrix, made once.
"""

import math

import torch
from torch import Tensor, nn

from rtb_inverse.checks import check_count
from tasks.linear import LinearTask, check_ratio, image_shape


def ray_sums(n: int, degrees: Tensor) -> tuple[Tensor, Tensor, int]:
    """The sums along rays, in pixels, as a sparse matrix (N * angles, n * n): its indices (2, nnz), its values (nnz,), and the number N of
    detector cells, one pixel apart, which cover the diagonal."""
    from deepinv.physics.functional import Radon

    grid = Radon(n, degrees, parallel_computation=False, dtype=torch.float64).all_grids[:, 0]  # (angle, N along the ray, N rays, 2)
    N, angles = grid.shape[1], len(degrees)
    x, y = ((grid + 1) / 2 * (N - 1) - (N // 2 - n // 2)).unbind(-1)  # in pixels of the image before it was padded to N x N
    ray = (torch.arange(N) * angles + torch.arange(angles)[:, None, None]).expand(x.shape)
    indices, values = [], []
    for row in (y.floor(), y.floor() + 1):
        for column in (x.floor(), x.floor() + 1):
            weight = (1 - (y - row).abs()) * (1 - (x - column).abs())
            seen = (row >= 0) & (row < n) & (column >= 0) & (column < n) & (weight > 0)
            indices.append(torch.stack([ray[seen], (row * n + column)[seen].long()]))
            values.append(weight[seen])
    matrix = torch.sparse_coo_tensor(torch.cat(indices, 1), torch.cat(values), (N * angles, n * n), check_invariants=False).coalesce()
    return matrix.indices(), matrix.values().float(), N


def ramp(N: int) -> Tensor:
    """Convolution of N detector cells with the ramp filter |frequency|, (N, N) (Kak and Slaney 1988, chapter 3, equation 61)."""
    lag = (torch.arange(N)[:, None] - torch.arange(N)).double()
    odd = -1 / (torch.pi * lag).square().where(lag != 0, 1.0)
    return torch.where(lag == 0, 0.25, torch.where(lag % 2 == 1, odd, 0.0)).float()


class Projection(nn.Module):
    """The line integrals of x - air, in widths of the image: (M, C, n, n) to (M, C, N, angles).

    Args:
        n: pixels along each side.
        angles, arc: see `Tomography`.
        air: the value of x where nothing is.
    """

    degrees: Tensor
    indices: Tensor
    values: Tensor
    ramp: Tensor

    def __init__(self, n: int, angles: int, arc: float, air: float):
        super().__init__()
        degrees = torch.arange(check_count("angles", angles)) * (check_ratio("arc", arc, 180) / angles)
        indices, values, self.detectors = ray_sums(n, degrees)
        self.n, self.step, self.air = n, math.radians(arc) / angles, air
        self.register_buffer("degrees", degrees)
        self.register_buffer("indices", indices, persistent=False)
        self.register_buffer("values", values / n, persistent=False)
        self.register_buffer("ramp", ramp(self.detectors), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        size = (self.detectors * len(self.degrees), self.n**2)
        matrix = torch.sparse_coo_tensor(self.indices, self.values.to(x.dtype), size, is_coalesced=True, check_invariants=False)
        planes = (x - self.air).reshape(-1, self.n**2)
        return (matrix @ planes.T).T.reshape(*x.shape[:2], self.detectors, len(self.degrees))

    def filtered_back_projection(self, y: Tensor) -> Tensor:
        """air + (arc / angles) A^T ramp(y), from line integrals (M, C, N, angles) to images (M, C, n, n)."""
        zero = y.new_zeros((*y.shape[:2], self.n, self.n))
        pull = torch.func.vjp(self, zero)[1]  # type: ignore[misc]  # three only with has_aux
        return self.air + self.step * self.n**2 * pull(self.ramp.to(y.dtype) @ y)[0]


class Tomography(LinearTask):
    """y = line integrals of x - air + noise_std n, (B, C, N, angles): N detector cells, one pixel apart, that cover the diagonal.

    Args:
        shape: of x, (C, n, n).
        angles: how many, at equal distances from 0 on, the end of the arc left out. Few of them: sparse-angle tomography.
        arc: in degrees, (0, 180]. Below 180: limited-angle tomography.
        air: the value of x where nothing is, which also surrounds the image; lines are integrated above it. That of the black of the
            shipped priors, whose x is in [-1, 1], by default.
        noise_std: standard deviation of the noise, > 0, in units of x times the width of the image: a ray through a bright bar of a
            quarter of the width gives 0.5.

    Raises:
        ValueError: no angles; an arc outside (0, 180]; a shape that is not (C, n, n); noise_std <= 0.
    """

    operator: Projection

    def __init__(self, shape, angles: int = 15, arc: float = 180.0, noise_std: float = 0.02, air: float = -1.0):
        shape = image_shape(shape, square=True)
        projection = Projection(shape[-1], angles, arc, float(air))
        super().__init__(projection, shape, noise_std, angles=angles, arc=float(arc), air=float(air))

    def condition(self, y):
        """Filtered back-projection, (B, C, n, n)."""
        return self.operator.filtered_back_projection(y)
