"""What a guide is, and what it says."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rtb_inverse.problems import InverseProblem

DENSE_LIMIT = 2**22  # elements of a matrix that is kept


@dataclass
class Update:
    """The move of the estimate and what is left of its variance.

    Attributes:
        delta: (*batch, *shape).
        shrink: factor on the variance: (*batch or ones, *shape); along `basis`, (*batch or ones, m); None where it is not known.
        basis: (d, m), or (*batch or ones, d, m), orthonormal, in units of r_t; None where the variance shrinks element by element.
        level: the variance across the basis, (*batch or ones); None: the denoiser's error r_t^2, element by element.
        slope: makes b (*batch, *shape), the slope of log p(y | x) at the moved estimate (of a smoothed likelihood: at the estimate), so
            that delta is the covariance times b; None where the guide has no use for another covariance.
    """

    delta: Tensor
    shrink: Tensor | None = None
    basis: Tensor | None = None
    level: Tensor | None = None
    slope: Callable[[], Tensor] | None = None


class Guide(nn.Module):
    """Moves an estimate of x_0 by y. `exact`: what is left of the variance is known too, in all directions; `per_observation`: it differs
    from one y to the next."""

    exact = per_observation = False

    def at(self, x_t: Tensor, t: Tensor) -> Any:
        """What `forward` has to know of a state besides the error r_t^2."""
        return None

    def forward(self, x_0: Tensor, y: Tensor, error: Tensor, at: Any = None) -> Update:
        """
        Args:
            x_0: the estimate, (*batch, *shape), the last axis of the batch that of y (B, *y_shape).
            error: r_t^2, (*batch or ones, *shape). at: what `at` gave.
        """
        raise NotImplementedError


def affine(problem: InverseProblem) -> tuple[Tensor, Tensor]:
    """The matrix (m, d) and the offset (m,) of an affine operator."""
    operator = problem.operator if isinstance(problem.operator, nn.Module) else nn.Identity()
    own = (c.dtype for c in (*operator.parameters(), *operator.buffers()) if c.is_floating_point())
    zero = torch.zeros((1, *problem.shape), device=problem.noise.std.device, dtype=next(own, problem.tried_in))
    with torch.no_grad():
        offset = problem(zero)[0].flatten()
        columns = torch.eye(zero.numel(), device=zero.device, dtype=zero.dtype).reshape(-1, *problem.shape)
        return torch.cat([problem(part).reshape(len(part), -1) - offset for part in columns.split(256)]).T, offset


def product_by_time(states: Tensor, matrices: list[Tensor], which: Tensor) -> Tensor:
    """Each state (*batch, d) times the matrix (e, d) of its time, `which` (*batch) of them: (*batch, e). One product for all states of one
    time, for which a GPU is waited for once."""
    if len(matrices) == 1:
        return states @ matrices[0].T
    flat, of = states.reshape(-1, states.shape[-1]), which.expand(states.shape[:-1]).flatten()
    order, counts = of.argsort(stable=True), of.bincount(minlength=len(matrices)).tolist()
    parts = [part @ matrix.T for part, matrix in zip(flat[order].split(counts), matrices, strict=True)]
    return torch.cat(parts)[order.argsort()].reshape(*states.shape[:-1], -1)
