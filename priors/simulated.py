"""What the simulators of training images share: random parameters, and the data that a prior is trained on."""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor
from torch.utils.data import TensorDataset

from priors.tensor_data import TensorData
from rtb_inverse.checks import check_count

AT_ONCE = 256  # images made together


class Draws:
    """Independent random parameters of n images, each (n, *shape)."""

    def __init__(self, n: int, generator: Generator | None):
        self.n, self.generator = n, generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand((self.n, *shape), generator=self.generator)

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return self.uniform(math.log(low), math.log(high), *shape).exp()

    def normal(self, *shape: int) -> Tensor:
        return torch.randn((self.n, *shape), generator=self.generator)

    def chance(self, probability: float, *shape: int) -> Tensor:
        """True with this probability."""
        return self.uniform(0, 1, *shape) < probability


def in_parts(n: int, make: Callable[[int], Tensor]) -> Tensor:
    """n images, a few at a time: `make` is from their number to a batch."""
    return torch.cat([make(min(AT_ONCE, n - first)) for first in range(0, n, AT_ONCE)])


class SimulatedData(TensorData):
    """Simulated images for training a prior, (batch_size, 1, size, size); validation on others. Subclasses say how one `make`s them.

    Args:
        batch_size: images per step.
        images: for training, the same ones in every epoch; made at the start, which takes half a minute at most for the default.
        held_out: how many validation sees, in one batch.
        size: pixels along each side.

    Raises:
        ValueError: a count below 1.
    """

    make: Callable[[int, Generator, int], Tensor]

    def __init__(self, batch_size: int = 64, images: int = 20_000, held_out: int = 512, size: int = 32):
        counts = check_count("images", images), check_count("held_out", held_out)
        train, val = (TensorDataset(self.make(count, Generator().manual_seed(seed), size)) for seed, count in enumerate(counts))
        super().__init__(train, val, batch_size)
