"""Denoising: y = x + noise_std n."""

import torch

from rtb_inverse.checks import check_count
from tasks.linear import LinearTask, Physics


class Denoising(LinearTask):
    """y = x + noise_std n, (B, *shape).

    Args:
        shape: of x: (d,), (C, L), (C, H, W), ...
        noise_std: standard deviation of the noise, > 0, in the units of x (whose range is the prior's own, [-1, 1] for the shipped ones).

    Raises:
        ValueError: a shape that is none; noise_std <= 0.
    """

    def __init__(self, shape, noise_std: float = 0.5):
        from deepinv.physics import Denoising as Identity

        if not isinstance(shape, (tuple, list)) or not shape:
            raise ValueError(f"shape must be that of x, such as (C, H, W), got {shape!r}")
        shape = torch.Size(check_count("sizes in shape", size) for size in shape)
        super().__init__(Physics(Identity, shape), shape, noise_std)
        self.register_buffer("mask", torch.ones(shape, dtype=torch.bool))  # every element is seen: the update by y is exact one by one

    def condition(self, y):
        """y itself."""
        return y
