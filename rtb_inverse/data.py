"""What the trainings are fed by lightning."""

from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from rtb_inverse import checkpoints
from rtb_inverse.checks import check_count, check_tensor


class ObservationData(LightningDataModule):
    """What a posterior is fed: a stream of step numbers in `fit` (the training draws its own paths), held-out observations in `test`,
    the user's observations in `predict`.

    Args:
        simulated: how many observations `test` simulates from the prior's own draws.
        held_out: clean examples for `test`, from which as many observations are simulated as it holds, at most `simulated`: a tensor
            (M, *data_shape), the path of a .npy or .safetensors file, or a function without arguments that gives one of them.
        y: observations for `predict`, (B, *y_shape): a tensor or the path of a .npy or .safetensors file.
    """

    def __init__(self, simulated: int = 64, held_out: Tensor | str | Callable | None = None, y: Tensor | str | None = None):
        super().__init__()
        self.simulated = check_count("simulated", simulated)
        self.held_out, self.y = held_out, None if y is None else read_tensor("y", y)

    def train_dataloader(self):
        steps = self.trainer.max_steps if self.trainer is not None else -1
        return stream(range(steps if steps > 0 else 10**9))

    def test_dataloader(self):
        sources = [("simulated", self.simulated)]
        if self.held_out is not None:
            sources.append(("held_out", read_tensor("held_out", self.held_out)[: self.simulated]))
        return stream(sources)

    def predict_dataloader(self):
        if self.y is None:
            raise ValueError("y must name a .npy or .safetensors file of observations for predict, got None (data.init_args.y)")
        return stream([self.y])


def stream(items) -> DataLoader:
    """Item by item; its generator is its own, so that the global random state stays as it is."""
    return DataLoader(items, batch_size=None, collate_fn=lambda item: item, generator=torch.Generator())


def read_tensor(name: str, source) -> Tensor:
    """A float32 tensor from a tensor, an array file, or a function that gives one (or a tuple that starts with one)."""
    if callable(source):
        source = source()
    if isinstance(source, (tuple, list)):
        source = source[0]
    if isinstance(source, (str, Path)):
        source = checkpoints.load_array(name, Path(source))
    return check_tensor(name, source).float()
