r"""Deblurring behind a camera that saturates: y = s(k * x) + noise_std n, with a Gaussian kernel k and the response

    s(u) = tanh(gain u) / tanh(gain),

which maps [-1, 1] onto [-1, 1], has the slope gain / tanh(gain) at 0, and flattens towards both ends.
"""

import math

import torch
from torch import Tensor, nn

from rtb_inverse.checks import check_positive
from rtb_inverse.problems import GaussianNoise, InverseProblem


def gaussian_kernel(std: float) -> Tensor:
    """Weights of a Gaussian blur, cut at 3 standard deviations (pixels) and summing to 1: (k, k), float64, k odd."""
    pixels = torch.arange(-math.ceil(3 * std), math.ceil(3 * std) + 1, dtype=torch.float64)
    row = torch.exp(-0.5 * (pixels / std) ** 2)
    return torch.outer(row, row) / row.sum() ** 2


class SaturatingDeblurring(InverseProblem):
    """y = s(k * x) + noise_std n, of x's shape; without noise y is in (-1 / tanh(gain), 1 / tanh(gain)), and in [-1, 1] for such x.

    Args:
        shape: of x, (C, H, W).
        blur_std: standard deviation of the kernel, > 0, in pixels; at the borders the image is continued by its last pixels.
        gain: > 0; towards 0 the camera is linear, at 2 its slope falls from 2.1 at x = 0 to 0.15 at x = 1 and x = -1.
        noise_std: standard deviation of the noise, > 0, in the units of x.

    Raises:
        ValueError: a shape that is no image's; blur_std, gain or noise_std <= 0.
    """

    kernel: Tensor

    def __init__(self, shape, blur_std: float = 1.0, gain: float = 2.0, noise_std: float = 0.05):
        if len(shape) != 3:
            raise ValueError(f"shape must be that of an image, (C, H, W), got {tuple(shape)}")
        kernel = gaussian_kernel(check_positive("blur_std", blur_std))
        self.gain = check_positive("gain", gain)
        super().__init__(self.observed, GaussianNoise(noise_std), linear=False)
        self.register_buffer("kernel", kernel)
        self.config = {"shape": list(shape), "blur_std": float(blur_std), "gain": self.gain, "noise_std": float(noise_std)}
        self.bind(shape)

    def blur(self, x: Tensor) -> Tensor:
        """k * x, for images (M, C, H, W)."""
        reach, kernel = len(self.kernel) // 2, self.kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)
        return nn.functional.conv2d(nn.functional.pad(x, (reach,) * 4, mode="replicate"), kernel, groups=x.shape[1])

    def observed(self, x: Tensor) -> Tensor:
        """s(k * x), (M, C, H, W)."""
        return torch.tanh(self.gain * self.blur(x)) / math.tanh(self.gain)

    def condition(self, y):
        """The inverse response of y, clipped to [-1, 1] where noise takes it out: the blurred image, (B, C, H, W)."""
        return torch.atanh(y.clamp(-1, 1) * math.tanh(self.gain)) / self.gain

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "SaturatingDeblurring":
        """Rebuild from `config`."""
        return cls(**config)
