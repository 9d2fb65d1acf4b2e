"""One clear error per bad input: it names the argument, says what it was and what is expected."""

import math
import os
import tempfile
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor


def check_count(name: str, value, least: int = 1) -> int:
    """Return `value` if it is an integer of at least `least`; raise ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)


def check_seed(name: str, value) -> int:
    """Return `value` if it is an integer from 0 to 2^62; raise ValueError otherwise."""
    seed = check_count(name, value, 0)
    if seed > 2**62:
        raise ValueError(f"{name} must be at most 2^62, got {value!r}")
    return seed


def check_positive(name: str, value: float) -> float:
    """Return `value` as a float if it is a finite number above 0; raise ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)


def check_number(name: str, value: float, least: float = -math.inf, below: float = math.inf) -> float:
    """Return `value` as a float if it is a finite number, at least `least` and below `below`; raise ValueError otherwise."""
    finite = not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
    if not finite or not least <= value < below:
        bounds = [f" of at least {least:g}"] * (least > -math.inf) + [f" below {below:g}"] * (below < math.inf)
        raise ValueError(f"{name} must be a finite number{''.join(bounds)}, got {value!r}")
    return float(value)


def one_number(name: str, value):
    """The element of a tensor that has one, any other `value` as it is; raise ValueError for a tensor of more."""
    if isinstance(value, Tensor) and value.numel() != 1:
        hint = "InverseProblem(operator, noise) takes one for each element of y"
        raise ValueError(f"{name} must be one number here, got a tensor of shape {tuple(value.shape)}; {hint}")
    return value.item() if isinstance(value, Tensor) else value


def check_choice(name: str, value, choices) -> str:
    """Return `value` if it is one of `choices`; raise ValueError otherwise."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
    return value


def check_tensor(name: str, value, event_shape=None, batch: bool = True) -> Tensor:
    """Return `value` if it is a finite, floating-point tensor of shape (B, *event_shape), B >= 1; without B where `batch` is false."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {value.dtype}")
    if event_shape is not None:
        event_shape = tuple(event_shape)
        head = value.ndim - len(event_shape)
        if head != int(batch) or tuple(value.shape[head:]) != event_shape:
            expected = (("B",) if batch else ()) + event_shape
            raise ValueError(f"{name} must have shape ({', '.join(map(str, expected))}), got {tuple(value.shape)}")
    if value.numel() == 0:
        raise ValueError(f"{name} is empty: its shape is {tuple(value.shape)}, expected at least one element in the batch")
    check_finite(name, value)
    return value


def check_finite(name: str, value: Tensor) -> Tensor:
    """Return `value` if it holds neither NaN nor infinity; raise ValueError otherwise."""
    if not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{name} must be finite, got NaN or infinity in {bad} of {value.numel()} elements")
    return value


def check_writable(name: str, folder: str | os.PathLike) -> Path:
    """Create `folder` where it is missing and write a file in it; raise ValueError where that cannot be done."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ValueError(f"{name} must be a folder that can be written to, got {str(folder)!r} ({error.strerror})") from error


def check_fraction(name: str, value: float) -> float:
    """Return `value` if it is in [0, 1]; raise ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}")
    return value
