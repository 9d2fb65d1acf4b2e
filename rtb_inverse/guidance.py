r"""How an observation moves the denoiser's estimate of x_0.

Take x_0 ~ N(x0hat, r^2) (the denoiser's error) and y = A(x_0) + sigma n. The Gaussian update is

    x0hat + r^2 J^T (r^2 J J^T + sigma^2)^{-1} (y - A(x0hat)),   J = dA/dx at x0hat,

and it leaves the variance r^2 sigma^2 / (r^2 s^2 + sigma^2) along a singular vector of J with singular value s. It needs no
derivative of the network. (The estimate of Song et al. 2023, PiGDM, without its network Jacobian.)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtb_inverse.problems import GaussianNoise, InverseProblem

DENSE_LIMIT = 2**22


@dataclass
class Update:
    """The move of the estimate and what is left of its variance.

    Attributes:
        delta: (*batch, *shape).
        shrink: factor on the variance: (*batch or ones, *shape); along `basis`, (*batch or ones, m); None where it is not known.
        basis: (d, m), orthonormal; None where the variance shrinks element by element.
    """

    delta: Tensor
    shrink: Tensor | None = None
    basis: Tensor | None = None


class MaskGuidance(nn.Module):
    """The operator picks elements of x: the update is exact element by element."""

    mask: Tensor
    noise_variance: Tensor

    def __init__(self, problem: InverseProblem):
        super().__init__()
        self.register_buffer("mask", problem.mask, persistent=False)
        std = torch.zeros(problem.shape, dtype=problem.noise.std.dtype, device=problem.mask.device)
        std[problem.mask] = problem.noise.std
        self.register_buffer("noise_variance", std.double() ** 2, persistent=False)

    def forward(self, x_0: Tensor, y: Tensor, error: Tensor) -> Update:
        gain = torch.where(self.mask, error / (error + self.noise_variance), torch.zeros_like(error))
        image = y.new_zeros((len(y), *self.mask.shape))
        image[:, self.mask] = y
        return Update(gain.to(x_0.dtype) * (image - x_0), 1 - gain)


class DenseGuidance(nn.Module):
    """A small affine operator: the update is exact by the singular value decomposition of its whitened matrix.
    The errors of the elements are averaged to one level."""

    basis: Tensor
    singular: Tensor
    whiten: Tensor
    offset: Tensor

    def __init__(self, problem: InverseProblem):
        super().__init__()
        operator = problem.operator if isinstance(problem.operator, nn.Module) else nn.Identity()
        own = (c.dtype for c in (*operator.parameters(), *operator.buffers()) if c.is_floating_point())
        zero = torch.zeros((1, *problem.shape), device=problem.noise.std.device, dtype=next(own, torch.get_default_dtype()))
        offset = problem(zero)[0].flatten()
        columns = torch.eye(zero.numel(), device=zero.device, dtype=zero.dtype).reshape(-1, *problem.shape)
        matrix = torch.cat([problem(part).reshape(len(part), -1) - offset for part in columns.split(256)]).T.detach()
        std = problem.noise.std.expand(problem.y_shape).flatten()
        self.event_dim = len(problem.shape)
        U, S, Vh = torch.linalg.svd((matrix / std[:, None]).double(), full_matrices=False)
        self.register_buffer("basis", Vh.T.to(matrix.dtype).contiguous(), persistent=False)
        self.register_buffer("singular", S, persistent=False)
        self.register_buffer("whiten", (U.T / std).to(matrix.dtype), persistent=False)  # y to U^T y / sigma
        self.register_buffer("offset", offset.detach(), persistent=False)

    def forward(self, x_0: Tensor, y: Tensor, error: Tensor) -> Update:
        level = error.flatten(error.ndim - self.event_dim).mean(-1, keepdim=True)
        shrink = 1 / (level * self.singular**2 + 1)
        basis, whiten, offset = (c.to(x_0.dtype) for c in (self.basis, self.whiten, self.offset))
        known = x_0.flatten(x_0.ndim - self.event_dim) @ basis * self.singular.to(x_0.dtype)
        move = (level * self.singular * shrink).to(x_0.dtype) * ((y.reshape(len(y), -1) - offset) @ whiten.T - known)
        return Update((move @ basis.T).reshape(x_0.shape), shrink, basis)


class GradientGuidance(nn.Module):
    """Any differentiable operator: the update by a few steps of conjugate gradients on
    (r^-2 + J^T J / sigma^2) delta = J^T (y - A) / sigma^2, with products by J and J^T only. One step is the likelihood's gradient with
    the best step size of the linearised problem.

    Where A is not affine, delta is clipped softly to a root mean square of `clip` times the denoiser's error.
    """

    operator: Callable[[Tensor], Tensor]
    noise_std: Tensor

    def __init__(self, problem: InverseProblem, operator: Callable[[Tensor], Tensor], iterations: int, clip: float | None = 3.0):
        super().__init__()
        self.operator, self.iterations, self.clip = operator, iterations, clip
        self.event_dim = len(problem.shape)
        self.register_buffer("noise_std", problem.noise.std, persistent=False)

    def forward(self, x_0: Tensor, y: Tensor, error: Tensor) -> Update:
        shape = x_0.shape
        batch, event = shape[: x_0.ndim - self.event_dim], shape[x_0.ndim - self.event_dim :]
        r = error.sqrt().to(x_0.dtype).expand(shape).reshape(-1, *event)
        std = self.noise_std.to(x_0.dtype)
        target = (y / std).expand(*batch, *y.shape[1:]).reshape(-1, *y.shape[1:])

        def whitened(x):
            return self.operator(x) / std

        clean, pull = torch.func.vjp(whitened, x_0.reshape(-1, *event))  # type: ignore[misc]  # three only with has_aux

        def push(v):
            return torch.func.jvp(whitened, (x_0.reshape(-1, *event),), (v,))[1]

        delta = r * conjugate_gradients(lambda v: v + r * pull(push(r * v))[0], r * pull(target - clean)[0], self.iterations)
        if self.clip is not None:
            size = (delta**2).flatten(1).mean(1) / (self.clip**2 * (r**2).flatten(1).mean(1))
            delta = delta * (1 + size).rsqrt().reshape(-1, *(1,) * self.event_dim)
        return Update(delta.reshape(shape))


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """A few steps towards matrix(x) = b from x = 0, for a batch (M, *shape) of symmetric positive definite systems at once."""

    def dot(u, v):
        return (u * v).flatten(1).sum(1).reshape(-1, *(1,) * (u.ndim - 1))

    x, residual, direction = torch.zeros_like(b), b, b
    norm = dot(residual, residual)
    for _ in range(iterations):
        image = matrix(direction)
        step = norm / dot(direction, image).clamp_min(torch.finfo(b.dtype).tiny)
        x, residual = x + step * direction, residual - step * image
        previous, norm = norm, dot(residual, residual)
        direction = residual + norm / previous.clamp_min(torch.finfo(b.dtype).tiny) * direction
    return x


def guidance(problem: InverseProblem, decode: Callable[[Tensor], Tensor] | None = None) -> nn.Module | None:
    """The best Gaussian update that the problem allows; None for a reward, another noise than Gaussian, or an operator without gradients.

    Args:
        problem: bound to its shape.
        decode: from chain space to data space, where that is not the identity.
    """
    if not isinstance(problem.noise, GaussianNoise) or not problem.differentiable:
        return None
    if decode is not None:
        return GradientGuidance(problem, lambda z: problem(decode(z)), iterations=1)
    if problem.mask is not None:
        return MaskGuidance(problem)
    if not problem.linear:
        return GradientGuidance(problem, problem, iterations=1)
    if problem.shape.numel() * problem.y_shape.numel() <= DENSE_LIMIT:
        return DenseGuidance(problem)
    return GradientGuidance(problem, problem, iterations=5, clip=None)
