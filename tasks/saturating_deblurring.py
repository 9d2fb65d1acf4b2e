r"""Deblurring behind a camera that saturates: y = s(k * x) + noise_std n, with a Gaussian kernel k and the response

    s(u) = tanh(gain u) / tanh(gain),

which maps [-1, 1] onto [-1, 1], has the slope gain / tanh(gain) at 0, and flattens towards both ends.
"""

import math

import torch
from torch import Tensor

from rtb_inverse.checks import check_positive, one_number
from rtb_inverse.problems import GaussianNoise, InverseProblem
from tasks.deblurring import convolution, gaussian_kernel
from tasks.linear import image_shape


class SaturatingDeblurring(InverseProblem):
    """y = s(k * x) + noise_std n, of x's shape; without noise y is in (-1 / tanh(gain), 1 / tanh(gain)), and in [-1, 1] for such x.

    Args:
        shape: of x, (C, H, W).
        blur_std: standard deviation of the kernel, > 0, in pixels, at most a quarter of the image's side; it is cut at three of them. At
            the borders the image is continued by its last pixels.
        gain: > 0; towards 0 the camera is linear, at 2 its slope falls from 2.1 at x = 0 to 0.15 at x = 1 and x = -1.
        noise_std: standard deviation of the noise, > 0, in the units of x.

    Raises:
        ValueError: a shape that is not (C, H, W); blur_std, gain or noise_std <= 0, a blur too wide for the image.
    """

    def __init__(self, shape, blur_std: float = 1.0, gain: float = 2.0, noise_std: float = 0.05):
        shape, reach = image_shape(shape), math.ceil(3 * check_positive("blur_std", blur_std))
        if 4 * blur_std > min(shape[1:]):
            raise ValueError(f"blur_std must be at most a quarter of the image's side, {min(shape[1:]) / 4:g} pixels, got {blur_std!r}")
        self.gain = check_positive("gain", gain)
        noise_std = one_number("noise_std", noise_std)
        super().__init__(self.observed, GaussianNoise(noise_std), linear=False)
        self.y_range = (-1 / math.tanh(self.gain), 1 / math.tanh(self.gain))
        self.blur = convolution(gaussian_kernel(2 * reach + 1, float(blur_std)), "replicate", shape)
        self.config = {"shape": list(shape), "blur_std": float(blur_std), "gain": self.gain, "noise_std": float(noise_std)}
        self.bind(shape)

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
