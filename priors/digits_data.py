"""The 1,797 real 8x8 handwritten digits that scikit-learn ships (UCI optical recognition of handwritten digits, test part)."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset

from priors.tensor_data import TensorData
from rtb_inverse.checks import check_count

HELD_OUT = 300  # the last ones: other writers than most of the rest


def digits(held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Images in [-1, 1], (M, 1, 8, 8) float32, and labels (M,): the first 1,497, or the last 300, which no shipped prior has seen."""
    data = load_digits()
    part = slice(-HELD_OUT, None) if held_out else slice(None, -HELD_OUT)
    return torch.from_numpy(data.images[part] / 8 - 1).float()[:, None], torch.from_numpy(data.target[part])


def held_out_digits() -> Tensor:
    """The images of `digits(held_out=True)`, in an order that mixes the classes, (300, 1, 8, 8)."""
    images = digits(held_out=True)[0]
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]


class DigitsData(TensorData):
    """Digits for training a prior; validation on the held-out ones.

    Args:
        batch_size: images per step.
        steps_per_epoch: an epoch is this many batches drawn with replacement.
    """

    def __init__(self, batch_size: int = 128, steps_per_epoch: int = 500):
        train, held = (TensorDataset(digits(held_out)[0]) for held_out in (False, True))
        super().__init__(train, held, batch_size, check_count("steps_per_epoch", steps_per_epoch))
