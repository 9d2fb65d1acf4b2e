"""Denoising: y = x + noise_std n."""

import torch

from tasks.linear import LinearTask, Physics, image_shape


class Denoising(LinearTask):
    """y = x + noise_std n, (B, C, H, W).

    Args:
        shape: of x, (C, H, W).
        noise_std: standard deviation of the noise, > 0, in the units of x (whose range is the prior's own, [-1, 1] for the shipped ones).

    Raises:
        ValueError: a shape that is not (C, H, W); noise_std <= 0.
    """

    def __init__(self, shape, noise_std: float = 0.5):
        from deepinv.physics import Denoising as Identity

        shape = image_shape(shape)
        super().__init__(Physics(Identity, shape), shape, noise_std)
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))  # every element is seen: the update by y is exact one by one

    def condition(self, y):
        """y itself, (B, C, H, W)."""
        return y
