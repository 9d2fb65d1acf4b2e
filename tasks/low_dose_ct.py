r"""Low-dose computed tomography: photons counted behind the body, at a few angles or over part of the arc,

    y ~ Poisson(I_0 exp(-mu A (x - air)) + background)        (Beer and Lambert),

with the line integrals A (x - air), in widths of the image, of `tomography.Projection`. Rays through dense parts leave few photons, so
their noise, seen in -log(y / I_0), is large; no Gaussian with one standard deviation says so.
"""

from torch import Tensor

from rtb_inverse.checks import check_number, check_positive
from rtb_inverse.noise import PoissonNoise
from rtb_inverse.problems import InverseProblem
from tasks.linear import image_shape, lay_out
from tasks.tomography import Projection

DEPTHS = (-30.0, 80.0)  # cut there, so that float32 can hold exp(-depth): e^80 photons are never sent, and x is never far below air


class LowDoseCT(InverseProblem):
    """y ~ Poisson(I_0 exp(-mu A (x - air)) + background), counts (B, C, N, angles): N detector cells, one pixel apart, that cover the
    diagonal.

    Args:
        shape: of x, (C, n, n).
        angles: how many, at equal distances from 0 on, the end of the arc left out. Few of them: sparse-angle tomography.
        arc: in degrees, (0, 180]. Below 180: limited-angle tomography.
        photons: I_0, the mean count of a ray through air, > 0. A ray of depth d keeps I_0 e^{-d} of them.
        attenuation: optical depth of a ray across the whole width of an image of x = 1, > 0: mu (1 - air). Rays through the middle of
            a body of about half of that attenuation and 0.8 of the width, as those of `priors/phantoms`, have a depth of 2 to 4 at 8.
        background: mean count without the source (scatter, dark counts), at least 0.
        air: the value of x where nothing is, which also surrounds the image, below 1.

    Raises:
        ValueError: no angles; an arc outside (0, 180]; a shape that is not (C, n, n); photons or attenuation <= 0; a background below 0;
            air that is not finite and below 1.
    """

    def __init__(
        self, shape, angles: int = 15, arc: float = 180.0, photons: float = 1000.0, attenuation: float = 8.0, background: float = 0.0,
        air: float = -1.0,
    ):  # fmt: skip
        shape = image_shape(shape, square=True)
        photons, attenuation = check_positive("photons", photons), check_positive("attenuation", attenuation)
        background, air = check_number("background", background, 0), check_number("air", air, below=1)
        super().__init__(self.transmitted, PoissonNoise(photons, background), linear=False)
        self.projection, self.mu = Projection(shape[-1], angles, arc, air), attenuation / (1 - air)
        self.config = {
            "shape": list(shape), "angles": angles, "arc": float(arc), "photons": photons, "attenuation": attenuation,
            "background": background, "air": air,
        }  # fmt: skip
        self.bind(shape)

    def transmitted(self, x: Tensor) -> Tensor:
        """exp(-mu A (x - air)), the share of the photons that passes, (M, C, n, n) to (M, C, N, angles)."""
        return (-(self.mu * self.projection(x)).clamp(*DEPTHS)).exp()

    def depth(self, y: Tensor) -> Tensor:
        """-log((y - background) / I_0), of the shape of y; below half a photon above the background, as of half a photon."""
        photons, background = self.noise.gain.to(y.dtype), self.noise.background.to(y.dtype)
        return -((y - background).clamp_min(0.5) / photons).log()

    def condition(self, y):
        """Filtered back-projection of depth / mu, in the units of x, (B, C, n, n)."""
        return self.projection.filtered_back_projection(self.depth(y) / self.mu)

    def picture(self, y: Tensor) -> Tensor:
        """The depths, (B, C, N, angles)."""
        return lay_out(self.depth(y))

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "LowDoseCT":
        """Rebuild from `config`."""
        return cls(**config)
