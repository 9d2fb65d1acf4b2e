r"""Phase retrieval: a detector in the far field sees how much light there is, not its phase,

    y = |F u|^2 + noise   ("intensity")      or      y = sqrt(|F u|^2 + eps^2) + noise   ("amplitude"),

F the unitary Fourier transform of the image u = (x + 1) / 2, in [0, 1], padded with zeros. The padding makes |F u|^2 the transform of
the whole autocorrelation of u; what remains unknown, if little else, is where in the frame u lies and whether it is turned by 180 degrees.
"""

import math

import torch
from torch import Tensor, nn

from rtb_inverse.checks import check_choice, check_number, one_number
from rtb_inverse.problems import GaussianNoise, InverseProblem
from tasks.linear import image_shape

EPS = 1e-3  # of the amplitude, whose slope would jump at 0
DARK = 1e-2  # mean square of u, below which an image counts as dark


class PhaseRetrieval(InverseProblem):
    """y = |F u|^2 or sqrt(|F u|^2 + eps^2), + noise_std n, on half of the frequencies (those of `torch.fft.rfft2`; u is real, and the
    others repeat them): (B, C, P, Q // 2 + 1) with P x Q the padded size. Without noise y >= 0.

    Args:
        shape: of x, (C, H, W), in [-1, 1].
        kind: "amplitude" or "intensity".
        oversampling: P / H and Q / W, at least 1, rounded up to whole pixels; from 2 on y determines the whole autocorrelation.
        noise_std: standard deviation of the noise, > 0, in the units of y: the mean of |F u|^2 is that of u^2 / oversampling^2.

    Raises:
        ValueError: a shape that is not (C, H, W), another kind, an oversampling below 1, noise_std <= 0.
    """

    def __init__(self, shape, kind: str = "amplitude", oversampling: float = 2.0, noise_std: float = 0.02):
        shape = image_shape(shape)
        check_number("oversampling", oversampling, 1)
        self.kind = check_choice("kind", kind, ("amplitude", "intensity"))
        self.padded = tuple(math.ceil(oversampling * n) for n in shape[1:])
        noise_std = one_number("noise_std", noise_std)
        super().__init__(self.observed, GaussianNoise(noise_std), linear=False)
        self.y_range = (0.0, math.inf)
        self.config = {"shape": list(shape), "kind": kind, "oversampling": float(oversampling), "noise_std": float(noise_std)}
        self.bind(shape)

    def observed(self, x: Tensor) -> Tensor:
        """The amplitude or intensity of images (M, C, H, W): (M, C, P, Q // 2 + 1)."""
        P, Q = self.padded
        u = nn.functional.pad((x + 1) / 2, (0, Q - x.shape[-1], 0, P - x.shape[-2]))
        field = torch.fft.rfft2(u, norm="ortho")
        intensity = field.real**2 + field.imag**2
        return intensity if self.kind == "intensity" else (intensity + EPS**2).sqrt()

    def condition(self, y):
        """The autocorrelation R of u: 2 R(lag) / R(0) - 1, within [-1, 1], at pixel (i, j) that of lag (i, j), and as further channels
        that of lag (i, -j); the other lags repeat them. What the ratio leaves out, 2 R(0) / (H W) - 1, is the same everywhere.
        (B, 3 C, H, W)."""
        (H, W), (P, Q) = self.shape[1:], self.padded
        intensity = y if self.kind == "intensity" else y**2
        lags = torch.fft.irfft2(intensity, s=(P, Q), norm="ortho") * (math.sqrt(P * Q) / (H * W))  # R / (H W)
        zero = lags[..., :1, :1]
        ratio = lags / zero.clamp_min(DARK)
        return 2 * torch.cat([ratio[..., :H, :W], ratio.flip(-1).roll(1, -1)[..., :H, :W], zero.expand(-1, -1, H, W)], 1) - 1

    def picture(self, y: Tensor) -> Tensor:
        """The logarithm of y in the right half of the spectrum, low frequencies midway on the left, (B, C, P, Q // 2 + 1)."""
        return torch.fft.fftshift(y.clamp_min(float(self.noise.std)).log(), -2)

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "PhaseRetrieval":
        """Rebuild from `config`."""
        return cls(**config)
