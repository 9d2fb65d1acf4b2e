"""Random numbers on any device, from a generator wherever it lies; and what a seed makes, the same on every device."""

import functools
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from rtb_inverse.checks import check_seed


def check_generator(generator) -> None:
    """Raise TypeError where it is neither a torch.Generator nor None."""
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(f"generator must be a torch.Generator, as torch.Generator().manual_seed(0) makes one, got {generator!r}")


def generator_on(device: torch.device, generator: Generator | None) -> Generator | None:
    """The generator, or, if it lies on another device, one there, seeded by its next number; None for torch's global one. TypeError: as in
    `check_generator`."""
    check_generator(generator)
    if generator is None or generator.device.type == device.type:
        return generator
    return Generator(device).manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))


def standard_normal(x: Tensor, generator: Generator | None = None, shape=None) -> Tensor:
    """N(0, I) of the shape of x, or another, in its dtype, where x lies."""
    return torch.randn(x.shape if shape is None else shape, generator=generator_on(x.device, generator), device=x.device, dtype=x.dtype)


def uniform(shape, x: Tensor, generator: Generator | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Independent numbers in [0, 1) of a shape, where x lies, in its dtype or another."""
    return torch.rand(shape, generator=generator_on(x.device, generator), device=x.device, dtype=dtype or x.dtype)


def fixed_normal(seed: int, shape, dtype: torch.dtype | None = None) -> Tensor:
    """N(0, I) on the CPU, the same each time."""
    return torch.randn(shape, generator=seeded(seed), dtype=dtype, device="cpu")


def seeded(seed: int) -> Generator:
    """A generator of its own, on the CPU, so that a seed means the same on every device. ValueError: as in `check_seed`."""
    return Generator("cpu").manual_seed(check_seed("seed", seed))


def made_on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of a function that makes a tensor: make it on the CPU, the same wherever `torch.set_default_device` points, then move it there."""

    @functools.wraps(make)
    def made(*args, **kwargs) -> Tensor:
        with torch.device("cpu"):
            found = make(*args, **kwargs)
        return found.to(torch.get_default_device())

    return made
