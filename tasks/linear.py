r"""What the linear problems of imaging share: y = A x + noise_std n, n ~ N(0, I), for images x (C, H, W).

The operators are those of deepinv's physics where it has them (`Physics`): blurs, means of blocks and Matlab's resampling, random
matrices, the Fourier and Hadamard transforms, projections, greys. What it has not is torch's: resampling as Pillow does it, and the
elements of x that are seen, where deepinv's y has zeros for those that are not. What is random is in buffers, which are saved with a
posterior; deepinv is loaded where it is needed. (Any other physics of deepinv may be the operator of a problem as it is:
`InverseProblem(operator=physics.A, noise=...)`.)
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from rtb_inverse.checks import check_count, one_number
from rtb_inverse.guidance import DENSE_LIMIT, affine, conjugate_gradients
from rtb_inverse.problems import GaussianNoise, InverseProblem

AT_ONCE = 256  # images of single pixels that a physics is shown together


def image_shape(shape, channels: tuple[int, ...] | None = None, square: bool = False) -> torch.Size:
    """`shape` as (C, H, W), of so many channels; ValueError otherwise."""
    expected = f"({' or '.join(map(str, channels)) if channels else 'C'}, {'n, n' if square else 'H, W'})"
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else shape
    if not isinstance(shape, tuple) or len(shape) != 3 or (channels and shape[0] not in channels) or (square and shape[1] != shape[2]):
        raise ValueError(f"shape must be {expected}, got {shape!r}")
    return torch.Size(check_count("sizes in shape", size) for size in shape)


def check_ratio(name: str, value: float, most: float = 1) -> float:
    """`value` if it is in (0, most]; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= most:
        raise ValueError(f"{name} must be in (0, {most}], got {value!r}")
    return value


class Physics(nn.Module):
    """A of one of deepinv's linear physics, with its state in the dtype of x: (M, *shape) to (M, *y_shape).

    Where the matrix of A has few elements it is made, of its images of single pixels, and kept: its derivatives, which guides take by
    the hundred, cost as much as itself.

    Args:
        make: makes the physics, which cannot be pickled and is not saved.
        shape: of x, (C, H, W). kept: elements of a matrix up to which it is kept.
        saved: what has to be saved of the physics, in buffers of these names.
    """

    physics: Any
    here: Tensor
    matrix: Tensor | None  # (m, d), float64

    def __init__(self, make: Callable[[], nn.Module], shape: torch.Size, kept: int = 0, **saved: Tensor):
        super().__init__()
        self.make = make
        self.register_buffer("here", torch.zeros(0), persistent=False)  # on the device of all
        self.register_buffer("matrix", None, persistent=False)
        for name, buffer in saved.items():
            self.register_buffer(name, buffer)
        self._hold()
        self.y_shape, d = self(torch.zeros((1, *shape), dtype=torch.float64)).shape[1:], shape.numel()
        if d * self.y_shape.numel() <= kept:
            pixels = torch.eye(d, dtype=torch.float64).reshape(-1, *shape)
            self.matrix = torch.cat([self(some).flatten(1) for some in pixels.split(AT_ONCE)]).T.contiguous()

    def _hold(self) -> None:
        with torch.device("cpu"):  # where all is made, and is the same
            physics = self.make()
        for part in physics.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part.register_buffer(name, buffer, persistent=False)
        self.physics = physics.to(self.here.device)

    def __getstate__(self):
        return self.__dict__ | {"_modules": {}}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._hold()

    def forward(self, x: Tensor) -> Tensor:
        if self.matrix is not None:
            return (x.flatten(1) @ self.matrix.to(x.dtype).T).reshape(-1, *self.y_shape)
        state = {name: b.to(x.dtype) for name, b in self.named_buffers() if b.is_floating_point() and b.dtype != x.dtype}
        return torch.func.functional_call(self, state, (x,)) if state else self.physics.A(x)


def lay_out(y: Tensor) -> Tensor:
    """y (B, *y_shape) as images (B, 1 or 3, h, w): itself where it is one, else line by line, with NaN at the end of the last."""
    if y.ndim == 4 and y.shape[1] in (1, 3):
        return y
    flat = y.flatten(1)
    width = math.isqrt(flat.shape[1] - 1) + 1
    return nn.functional.pad(flat, (0, -flat.shape[1] % width), value=math.nan).reshape(len(y), 1, -1, width)


class LinearTask(InverseProblem):
    """A linear operator on images under Gaussian noise.

    Args:
        operator: from (M, *shape) to (M, *y_shape), with its state in buffers.
        shape: of x, (C, H, W).
        noise_std: standard deviation of the noise, > 0, in the units of y.
        config: the other arguments of the subclass, JSON, which rebuild it.
    """

    iterations = 10  # of conjugate gradients in `condition`, where A is too large for a matrix
    inverse: Tensor | None

    def __init__(self, operator: nn.Module, shape: torch.Size, noise_std: float, **config):
        noise_std = one_number("noise_std", noise_std)
        super().__init__(operator, GaussianNoise(noise_std), linear=True)
        self.config = {"shape": list(shape), "noise_std": float(noise_std), **config}
        self.register_buffer("inverse", None, persistent=False)
        self.bind(shape)

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "LinearTask":
        """Rebuild from `config`; what was drawn at random is taken from the saved buffers."""
        problem = cls(**config)
        problem.load_state_dict(weights)
        return problem

    def condition(self, y):
        """E[x | y] of a white x ~ N(0, I), (A^T A + noise_std^2)^{-1} A^T y, (B, C, H, W): by a matrix, made when it is first asked for,
        or, where that is too large, by a few conjugate gradients."""
        if self.shape.numel() * self.y_shape.numel() > DENSE_LIMIT:
            pull = torch.func.vjp(self.operator, y.new_zeros((len(y), *self.shape)))[1]  # type: ignore[misc]  # three only with has_aux
            variance = (self.condition_level * self.noise.std.to(y.dtype)) ** 2
            return conjugate_gradients(lambda v: pull(self.operator(v))[0] + variance * v, pull(y)[0], self.iterations)
        if self.inverse is None:
            A = affine(self)[0]
            square = A.double() @ A.double().T
            square.diagonal().add_((self.condition_level * self.noise.std.double()) ** 2)
            self.inverse = torch.linalg.solve(square, A.double()).T.to(A.dtype)  # A^T (A A^T + noise_std^2)^{-1}
        return (y.flatten(1) @ self.inverse.to(y.dtype).T).reshape(-1, *self.shape)

    def at_condition_level(self, level):
        other = super().at_condition_level(level)
        other.inverse = None
        return other

    def picture(self, y: Tensor) -> Tensor:
        """y laid out as images to look at, (B, 1 or 3, h, w), NaN where there is nothing."""
        return lay_out(y)
