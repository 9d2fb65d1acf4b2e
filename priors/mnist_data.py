"""The 70,000 real 28x28 handwritten digits of MNIST (LeCun, Cortes and Burges), read from a folder as torchvision keeps them."""

from pathlib import Path

from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.datasets import MNIST

from priors.tensor_data import TensorData

HELD_OUT = 5_000  # the last ones of the training part
PARTS = {
    "train": (True, slice(None, -HELD_OUT)),
    "held_out": (True, slice(-HELD_OUT, None)),
    "test": (False, slice(None)),
}


def mnist(folder: str | Path, part: str = "train") -> tuple[Tensor, Tensor]:
    """Images in [-1, 1], (M, 1, 28, 28) float32, and labels (M,).

    Args:
        folder: holds MNIST/raw, as `torchvision.datasets.MNIST(folder, download=True)` leaves it.
        part: "train", the first 55,000 of the training part; "held_out", its last 5,000, which no shipped prior or classifier has
            seen; "test", the 10,000 of the test part.

    Raises:
        FileNotFoundError: `folder` does not hold the data. ValueError: another part.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    train, chosen = PARTS[part]
    try:
        data = MNIST(folder, train=train, download=False)
    except RuntimeError as error:
        raise FileNotFoundError(
            f"folder: no MNIST in {str(folder)!r}, expected MNIST/raw below it, as MNIST(folder, download=True) of torchvision leaves it"
        ) from error
    return (data.data[chosen] / 127.5 - 1)[:, None], data.targets[chosen]


class MNISTData(TensorData):
    """MNIST for training a prior or a classifier, batches (images, labels); validation on images held out.

    Args:
        folder: see `mnist`.
        batch_size: images per step.
        held_out: how many of the 5,000 held-out images validation sees, in one batch.

    Raises:
        FileNotFoundError: `folder` does not hold the data.
    """

    def __init__(self, folder: str = "../shared/data", batch_size: int = 64, held_out: int = HELD_OUT):
        held = TensorDataset(*(tensor[:held_out] for tensor in mnist(folder, "held_out")))
        super().__init__(TensorDataset(*mnist(folder, "train")), held, batch_size)
