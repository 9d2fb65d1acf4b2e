"""Exponential moving average of trained parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class ExponentialMovingAverage(nn.Module):
    """avg <- d avg + (1 - d) parameter, with d = min(decay, (1 + n) / (10 + n)) at update n, so that a short run is averaged over its own
    length.

    Args:
        parameters: the tensors to follow; the average starts at their values.
        decay: in [0, 1).
    """

    updates: Tensor

    def __init__(self, parameters: Iterable[Tensor], decay: float = 0.999):
        super().__init__()
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay!r}")
        self.decay = decay
        self._followed = list(parameters)
        for i, parameter in enumerate(self._followed):
            self.register_buffer(f"average_{i}", parameter.detach().clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.long))

    @property
    def averages(self) -> list[Tensor]:
        return [self.get_buffer(f"average_{i}") for i in range(len(self._followed))]

    @torch.no_grad()
    def update(self) -> None:
        n = int(self.updates)
        torch._foreach_lerp_(self.averages, [p.detach() for p in self._followed], 1 - min(self.decay, (1 + n) / (10 + n)))
        self.updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange parameters and averages; a second call restores them."""
        for parameter, average in zip(self._followed, self.averages, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)
