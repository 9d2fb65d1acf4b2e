"""Training data that lie in memory."""

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

from rtb_inverse.checks import check_count


class TensorData(LightningDataModule):
    """Batches of tensors, in another order each epoch; validation on others, all in one batch."""

    def __init__(self, train_set: TensorDataset, val_set: TensorDataset, batch_size: int):
        super().__init__()
        self.train_set, self.val_set, self.batch_size = train_set, val_set, check_count("batch_size", batch_size)

    def train_dataloader(self):
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, len(self.val_set))
