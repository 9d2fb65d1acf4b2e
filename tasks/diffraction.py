r"""Coherent diffraction imaging: a detector in the far field counts the photons that an object scatters,

    y ~ Poisson(photons |F u|^2 + background),

F the unitary Fourier transform of the density u = (x - dark) / (1 - dark), padded with zeros (as in `phase_retrieval`, where the noise is
Gaussian). By Parseval, sum |F u|^2 = sum u^2: a pixel of density 1 scatters `photons` of them, whatever the padding.

Counts do not say where in the frame u lies, nor which way round: a shift by s multiplies F u by exp(-2 pi i k s), a turn by 180 degrees
gives its conjugate, and |F u|^2 stays. So where a prior holds an object shifted and turned in several ways, with weights w_m, the
posterior keeps the ratios of these weights. `ambiguous` has such a prior, to measure samplers with.
"""

import torch
from torch import Tensor

from rtb_inverse.checks import check_number, check_positive
from rtb_inverse.noise import PoissonNoise
from rtb_inverse.problems import InverseProblem
from tasks.linear import image_shape, lay_out
from tasks.phase_retrieval import PhaseRetrieval


class CoherentDiffraction(InverseProblem):
    """y ~ Poisson(photons |F u|^2 + background), counts (B, C, P, Q // 2 + 1) with P x Q the padded size: half of the detector's pixels,
    the frequencies of `torch.fft.rfft2`.

    u is real, so the other half repeats these rates, with counts of its own. Of each such pair of pixels one is counted here, but in the
    first column, and in the last where Q is even, both are, each with its own counts. (A whole detector says about as much as this half
    does at twice the photons.)

    Args:
        shape: of x, (C, H, W). Each channel is an image with a detector of its own.
        photons: that a pixel of density 1 (x = 1) scatters on average, over all frequencies, both halves; > 0. An image scatters
            photons * sum u^2.
        oversampling: P / H and Q / W, at least 1, rounded up to whole pixels; from 2 on y determines the whole autocorrelation. (An
            object known to fill no more than half of the frame, each way, is oversampled by 2 at 1 already; shifts are then cyclic.)
        background: mean count of a pixel without light (scatter, dark counts), at least 0.
        beam_stop: radius in pixels of the padded spectrum, at least 0: frequencies (k_1, k_2) with |k| below it are not counted; y is 0
            there. At 0 all are counted, up to 1 all but the mean of u.
        dark: the value of x where nothing is, which also surrounds the image, below 1.

    Raises:
        ValueError: a shape that is not (C, H, W); photons <= 0; an oversampling below 1; a background below 0; a beam stop below 0 or that
            leaves no pixel; dark that is not finite and below 1.
    """

    counted: Tensor

    def __init__(
        self, shape, photons: float = 1000.0, oversampling: float = 2.0, background: float = 0.0, beam_stop: float = 0.0, dark: float = -1.0
    ):  # fmt: skip
        shape, photons, background = image_shape(shape), check_positive("photons", photons), check_number("background", background, 0)
        beam_stop, dark = check_number("beam_stop", beam_stop, 0), check_number("dark", dark, below=1)
        far_field = PhaseRetrieval(shape, "intensity", oversampling)
        P, Q = far_field.padded
        k_1, k_2 = torch.fft.fftfreq(P, 1 / P)[:, None], torch.arange(Q // 2 + 1)
        counted = torch.hypot(k_1, k_2) >= beam_stop
        if not counted.any():
            raise ValueError(f"beam_stop must leave a pixel of the {P} x {Q} of the padded spectrum, got {beam_stop:g}")
        super().__init__(self.intensity, PoissonNoise(photons, background * counted.double()), linear=False)
        self.far_field, self.dark = far_field, dark
        self.register_buffer("counted", counted, persistent=False)
        self.config = {
            "shape": list(shape), "photons": photons, "oversampling": float(oversampling), "background": background,
            "beam_stop": beam_stop, "dark": dark,
        }  # fmt: skip
        self.bind(shape)

    def intensity(self, x: Tensor) -> Tensor:
        """|F u|^2, 0 behind the beam stop: (M, C, H, W) to (M, C, P, Q // 2 + 1)."""
        u = (x - self.dark) / (1 - self.dark)
        return self.far_field.observed(2 * u - 1) * self.counted

    def estimate(self, y: Tensor) -> Tensor:
        """(y - background) / photons, of mean |F u|^2, of the shape of y; below 0 where there is less than the background."""
        return (y - self.noise.background.to(y.dtype)) / self.noise.gain.to(y.dtype)

    def check_y(self, y):
        y = super().check_y(y)
        if (y * ~self.counted).any():
            raise ValueError(
                f"y must be 0 behind the beam stop, of radius {self.config['beam_stop']:g}, got {float((y * ~self.counted).max()):g}"
            )
        return y

    def residual(self, x, y):
        """(*batch, counted elements): there is nothing to see behind the beam stop."""
        return super().residual(x, y)[..., self.counted]

    def condition(self, y):
        """The autocorrelation of u, as `PhaseRetrieval` shows it, of the estimated intensity, without what the beam stop hides.
        (B, 3 C, H, W)."""
        return self.far_field.condition(self.estimate(y))

    def picture(self, y: Tensor) -> Tensor:
        """log10(1 + y) on the whole detector, the other half filled in by symmetry, frequency 0 at (P // 2, Q // 2); NaN behind the beam
        stop, (B, C, P, Q)."""
        Q = self.far_field.padded[1]
        half = (1 + y).log10().where(self.counted, torch.nan)
        mirrored = half[..., 1 : (Q + 1) // 2].flip(-2, -1).roll(1, -2)  # frequency -k
        return lay_out(torch.fft.fftshift(torch.cat([half, mirrored], -1), (-2, -1)))

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "CoherentDiffraction":
        """Rebuild from `config`."""
        return cls(**config)
