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
        of_epoch: batches of an epoch, whose examples are then drawn with replacement; None: each example once.
    """

    def __init__(self, n: int, batch_size: int, batches: Callable[[], int], of_epoch: int | None = None):
        self.n, self.batch_size, self.batches, self.of_epoch = n, batch_size, batches, of_epoch

    def __iter__(self) -> Iterator[int]:
        epoch, seen = divmod(self.batches(), self.of_epoch or max(1, self.n // self.batch_size))
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(self.n, generator=generator)
        if self.of_epoch is not None:
            order = torch.randint(self.n, (len(self),), generator=generator)
        yield from order.tolist()[seen * self.batch_size :]

    def __len__(self) -> int:
        return self.n if self.of_epoch is None else self.of_epoch * self.batch_size


class TensorData(LightningDataModule):
    """Batches of tensors, in another order each epoch; validation on others, all in one batch. `of_epoch`: see `OrderOfEpochs`."""

    def __init__(self, train_set: TensorDataset, val_set: TensorDataset, batch_size: int, of_epoch: int | None = None):
        super().__init__()
        self.train_set, self.val_set, self.batch_size = train_set, val_set, check_count("batch_size", batch_size)
        self.of_epoch = of_epoch

    def train_dataloader(self):
        order = OrderOfEpochs(len(self.train_set), self.batch_size, self._batches, self.of_epoch)
        return DataLoader(self.train_set, self.batch_size, sampler=order, drop_last=True)

    def _batches(self) -> int:
        return 0 if self.trainer is None else self.trainer.fit_loop.total_batch_idx + 1

    def val_dataloader(self):
        return DataLoader(self.val_set, len(self.val_set))
