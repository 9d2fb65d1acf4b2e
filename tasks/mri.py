"""Magnetic resonance imaging with one coil: some columns of the image's Fourier transform (k-space) are measured."""

import math
import warnings
from functools import partial
from numbers import Real

import torch
from torch import Tensor, nn

from rtb_inverse.checks import check_fraction
from rtb_inverse.randomness import made_on_cpu, seeded
from tasks.linear import LinearTask, Physics, image_shape


@made_on_cpu
def cartesian_columns(W: int, acceleration: float, central: float, seed: int) -> Tensor:
    """Which columns of k-space are measured, low frequencies in the middle, (W,) boolean: one in `acceleration`, of these a share
    `central` of all W in the middle, the others at random (deepinv's mask, that of fastMRI: Zbontar et al. 2018, arXiv 1811.08839)."""
    from deepinv.physics.generator import RandomMaskGenerator

    with warnings.catch_warnings(action="ignore", category=UserWarning):  # all in the middle is as good a choice as others
        generator = RandomMaskGenerator((1, W), acceleration, central, rng=seeded(seed))
        return generator.step()["mask"][0, 0, 0].bool()


class Spectrum(nn.Module):
    """The centred orthonormal Fourier transform, deepinv's physics of MRI: (M, 1 or 2, H, W), real or real and imaginary part, to
    (M, H, W, 2), low frequencies in the middle."""

    def __init__(self, H: int, W: int):
        from deepinv.physics import MRI

        super().__init__()
        self.transform = Physics(partial(MRI, img_size=(H, W)), torch.Size((2, H, W)))

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(nn.functional.pad(x, (0, 0, 0, 0, 0, 2 - x.shape[1]))).movedim(1, -1)


class KSpace(nn.Module):
    """The measured columns of the spectrum: (M, 1 or 2, H, W) to (M, H, columns, 2)."""

    columns: Tensor

    def __init__(self, H: int, columns: Tensor):
        super().__init__()
        self.spectrum = Spectrum(H, len(columns))
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor) -> Tensor:
        return self.spectrum(x)[:, :, self.columns].contiguous()


class MRI(LinearTask):
    """y = the measured columns of k-space + noise_std n, (B, H, columns, 2), real and imaginary parts.

    Args:
        shape: of x, (1, H, W) for real images or (2, H, W) for complex ones, real and imaginary part.
        acceleration: W over the number of measured columns, at least 1.
        central: share of the W columns that is measured in the middle, at most 1 / acceleration. The others are chosen by `seed`.
        noise_std: standard deviation of each number, > 0, in the units of x (whose range is the prior's own, usually [-1, 1]): the
            transform is orthonormal.

    Raises:
        ValueError: acceleration below 1, or beyond W; a central share too large for it; a shape that is neither; noise_std <= 0.
    """

    iterations = 3  # A^T A has no other eigenvalues than 0, 1/2 and 1: the condition is exact

    def __init__(self, shape, acceleration: float = 4, central: float = 0.1, seed: int = 0, noise_std: float = 0.05):
        shape = image_shape(shape, channels=(1, 2))
        W = shape[-1]
        if isinstance(acceleration, bool) or not isinstance(acceleration, Real) or not 1 <= acceleration <= W:
            raise ValueError(f"acceleration must be between 1 and the {W} columns of x, got {acceleration!r}")
        if int(check_fraction("central", central) * W) > W // acceleration:
            raise ValueError(f"central must be at most 1 / acceleration, {1 / acceleration:.3g}, got {central!r}")
        columns = cartesian_columns(W, acceleration, central, seed)
        super().__init__(KSpace(shape[1], columns), shape, noise_std, acceleration=acceleration, central=central, seed=seed)

    def picture(self, y):
        """The logarithm of the magnitudes where they lie in k-space, (B, 1, H, W)."""
        image = y.new_full((len(y), 1, *self.shape[1:]), math.nan)
        image[:, 0, :, self.operator.columns] = (y.square().sum(-1).sqrt() + 0.01).log()
        return image
