r"""Tomography: parallel beams through the image at some angles, y_{sa} = int (x - air) dl along the ray at distance s and angle a,
as deepinv has it.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from rtb_inverse.checks import check_count, check_number
from rtb_inverse.guidance import DENSE_LIMIT
from tasks.linear import LinearTask, Physics, check_ratio, image_shape


class Projection(nn.Module):
    """The line integrals of x - air, in widths of the image: (M, C, n, n) to (M, C, N, angles).

    deepinv turns the image and sums along its columns; where its matrix is not kept, that takes 10 to 20 times as long.

    Args:
        n: pixels along each side.
        angles, arc: see `Tomography`.
        air: the value of x where nothing is.
    """

    degrees: Tensor

    def __init__(self, n: int, angles: int, arc: float, air: float):
        from deepinv.physics import Tomography

        super().__init__()
        degrees = torch.arange(check_count("angles", angles), device="cpu") * (check_ratio("arc", arc, 180) / angles)
        self.n, self.arc, self.air = n, arc, air
        make = partial(Tomography, degrees, n, normalize=False, dtype=torch.float64, device="cpu")
        self.rays = Physics(make, torch.Size((1, n, n)), DENSE_LIMIT)
        self.register_buffer("degrees", degrees.to(self.rays.here.device))

    def forward(self, x: Tensor) -> Tensor:
        planes = self.rays((x - self.air).reshape(-1, 1, self.n, self.n)) / self.n
        return planes.reshape(*x.shape[:2], *planes.shape[2:])

    def filtered_back_projection(self, y: Tensor) -> Tensor:
        """deepinv's, from line integrals (M, C, N, angles) to images (M, C, n, n): air + (arc / angles) A^T of the ramp-filtered y."""
        ramp = self.rays.physics.iradon.filter
        zero = y.new_zeros((*y.shape[:2], self.n, self.n))
        pull = torch.func.vjp(self, zero)[1]  # type: ignore[misc]  # three only with has_aux
        return self.air + self.n**2 * math.radians(self.arc) / (2 * len(self.degrees)) * pull(ramp(y.double()).to(y.dtype))[0]


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
        projection = Projection(shape[-1], angles, arc, check_number("air", air))
        super().__init__(projection, shape, noise_std, angles=angles, arc=float(arc), air=float(air))

    def condition(self, y):
        """Filtered back-projection, (B, C, n, n)."""
        return self.operator.filtered_back_projection(y)
