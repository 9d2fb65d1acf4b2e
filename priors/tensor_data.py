"""Training data that lie in memory."""

from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Sampler, TensorDataset

from rtb_inverse.checks import check_count


class OrderOfEpochs(Sampler[int]):
    """Another order of n examples each epoch, and from where training is: a training that is resumed within an epoch sees the rest of it.

    Args:
        batch_size: examples of a batch; what is left over in an epoch is left out.
        batches: how many batches training has seen in all.
    """

    def __init__(self, n: int, batch_size: int, batches: Callable[[], int]):
        self.n, self.batch_size, self.batches = n, batch_size, batches

    def __iter__(self) -> Iterator[int]:
        epoch, seen = divmod(self.batches(), max(1, self.n // self.batch_size))
        yield from torch.randperm(self.n, generator=torch.Generator().manual_seed(epoch)).tolist()[seen * self.batch_size :]

    def __len__(self) -> int:
        return self.n


class TensorData(LightningDataModule):
    """Batches of tensors, in another order each epoch; validation on others, all in one batch."""

    def __init__(self, train_set: TensorDataset, val_set: TensorDataset, batch_size: int):
        super().__init__()
        self.train_set, self.val_set, self.batch_size = train_set, val_set, check_count("batch_size", batch_size)

    def train_dataloader(self):
        order = OrderOfEpochs(len(self.train_set), self.batch_size, self._batches)
        return DataLoader(self.train_set, self.batch_size, sampler=order, drop_last=True)

    def _batches(self) -> int:
        return 0 if self.trainer is None else self.trainer.fit_loop.total_batch_idx + 1

    def val_dataloader(self):
        return DataLoader(self.val_set, len(self.val_set))
