r"""A Gaussian random field on the torus [0, 2 pi)^2 as a generator: white noise z, one number for each of its real Fourier modes,

    x = sum_j s_j z_j phi_j,      s_j^2 proportional to (length_scale^{-2} + |k_j|^2)^{-smoothness},

the Karhunen-Loeve expansion of N(0, C), C proportional to (length_scale^{-2} - lap)^{-smoothness}, cut off at a highest frequency. In z
the chain is exact, and what a translation-invariant experiment leaves unknown is nearly diagonal.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from priors.generator import GeneratorPrior
from priors.mixture import read_analytic, save_analytic
from rtb_inverse.checks import check_count, check_positive


class FourierModes(nn.Module):
    """z (M, d) to x (M, 1, n, n); `modes` is (d, n, n), s_j phi_j."""

    modes: Tensor

    def __init__(self, n: int, highest: int, length_scale: float, smoothness: float, variance: float):
        super().__init__()
        k, l = (c.flatten() for c in torch.meshgrid(*(torch.arange(-highest, highest + 1).double().expand(2, -1)), indexing="ij"))
        half = (k > 0) | ((k == 0) & (l > 0))  # one of k and -k
        k, l = k[half], l[half]
        X = torch.arange(n, dtype=torch.float64) * (2 * math.pi / n)
        phase = k[:, None, None] * X[:, None] + l[:, None, None] * X
        power = (length_scale**-2 + k**2 + l**2) ** -smoothness
        scale = (power * variance / power.sum()).sqrt()[:, None, None]
        self.register_buffer("modes", torch.cat([scale * phase.cos(), scale * phase.sin()]))

    def forward(self, z: Tensor) -> Tensor:
        return torch.einsum("md,dhw->mhw", z, self.modes.to(z))[:, None]


class RandomField(GeneratorPrior):
    """A stationary Gaussian random field of mean 0, without its constant; images x (1, n, n), z of shape (d,).

    Args:
        n: grid points along each axis. highest: frequency along each axis, at least 1 and below n / 2; d = (2 highest + 1)^2 - 1.
        length_scale: > 0, in units where the torus is 2 pi long: waves longer than that have nearly equal variances.
        smoothness: > 0: how fast the variances of shorter waves fall. variance: > 0, of each element of x.
        steps, schedule, dtype: as of `GeneratorPrior`.

    Raises:
        ValueError: a frequency that the grid cannot carry; a parameter that is not above 0.
    """

    def __init__(
        self, n: int = 32, highest: int = 4, length_scale: float = 0.5, smoothness: float = 2.5, variance: float = 1.0, steps: int = 40,
        **options,
    ):  # fmt: skip
        if not check_count("highest", highest) < check_count("n", n) / 2:
            raise ValueError(f"highest must be below n / 2 = {n / 2:g}, got {highest}")
        parameters = {"length_scale": length_scale, "smoothness": smoothness, "variance": variance}
        modes = FourierModes(n, highest, **{name: check_positive(name, value) for name, value in parameters.items()})
        super().__init__(modes, len(modes.modes), steps=steps, **options)
        self.config = {"n": n, "highest": highest, **parameters}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the parameters and the schedule as `from_pretrained` reads them."""
        save_analytic(self, folder, steps=self.steps, **self.config)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "RandomField":
        """Load what `save_pretrained` wrote, in float32."""
        return cls(**read_analytic(folder)[1])
