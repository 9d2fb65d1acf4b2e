"""The guide of operators that have gradients, affine or not, of any noise that knows its mean and variance, through any decoder."""

from collections.abc import Callable

import torch
from torch import Tensor

from rtb_inverse.guidance.base import DENSE_LIMIT, Guide, Update, product_by_time
from rtb_inverse.problems import InverseProblem

TOLD = 1e-6  # of what y tells of the direction of which it tells most: directions below are taken for unseen


class GradientGuidance(Guide):
    """Any differentiable operator, and any noise that knows its mean and its variance: the update by a few steps of conjugate gradients on

        (r^-2 + J^T C^-1 J) delta = J^T C^-1 (y - m),      m = E[y | A(x0hat)],  C = Var[y | A(x0hat)],  J = dm/dx,

    with products by J and J^T only: for Gaussian noise m = A(x0hat) and C = sigma^2, for another one the Gaussian of its mean and its
    variance at the estimate. One step is the gradient with the best step size of the linearised problem. Where the covariance C_t of the
    denoiser's error is known, it stands in place of r^2 I.

    Where m is not affine or C not fixed, delta is clipped softly to a root mean square of `clip` times the denoiser's error, and m is
    linearised `rounds` times, each time where the last delta led (Gauss-Newton: J, m and C at x0hat + delta, and J delta added to y - m).

    All this in float64 where operator, noise and decoder take it: rounding grows with the condition of the system, r^2 |J|^2 / C, and
    float32 would leave delta, and so the density, to what else is in the batch.

    What y leaves of the variance differs from state to state; `learn` says what it leaves on average.

    Args:
        problem: differentiable, with a `residual`. decode: from chain space to data space, where that is not the identity.
    """

    basis: Tensor | None
    seen: Tensor | None  # h, (P, m)
    weight: Tensor | None  # (V / r)^2, (d, m)

    def __init__(
        self, problem: InverseProblem, iterations: int, clip: float | None = 3.0, decode: Callable[[Tensor], Tensor] | None = None,
        event_dim: int | None = None, rounds: int = 1, covariance: Callable[[Tensor], Tensor] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.covariance, self._decode, self._residual = covariance, decode, problem.residual
        self._roots: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
        self._wide: bool | None = None  # whether float64 is taken, once it is known
        self.iterations, self.clip, self.rounds = iterations, clip, rounds
        self.event_dim = len(problem.shape) if event_dim is None else event_dim
        for name in ("basis", "seen", "weight"):
            self.register_buffer(name, None)  # saved with a posterior, once learnt

    def at(self, x_t, t):
        return t if self.covariance is not None else None

    def misfit(self, x: Tensor, y: Tensor) -> Tensor:
        """E[y | x] - y, whitened, (*batch, m): x in chain space (*batch, *shape), y (B, *y_shape)."""
        residual = self._residual(x if self._decode is None else self._decode(x), y)
        return -residual.reshape(*x.shape[: x.ndim - self.event_dim], -1)

    @torch.no_grad()
    def learn(self, x_0: Tensor, y: Tensor, r: Tensor) -> "GradientGuidance":
        """See on pairs what y tells of x_0: the eigenvectors v_i of the mean over them of H = R J^T C^-1 J R, and each h_i = v_i^T H v_i.
        Of the variance c_i along v_i of the error, in units of R, y leaves the mean of 1 / (1 + c_i h_i). Returns itself.

        Args:
            x_0, y: P pairs, (P, *shape) and (P, *y_shape). r: root mean square errors (*shape), R = diag(r).
        """
        r = r.flatten().to(x_0.dtype)
        J = jacobian(lambda x: self.misfit(x, y), x_0) * r
        h, V = torch.linalg.eigh(sum((part.T @ part).double() for part in J) / len(J))
        V = V[:, h > TOLD * h.max()].to(x_0.dtype)
        self.basis, self.seen = V, (J @ V).double().square().sum(1)
        self.weight = (V.double() / r.double()[:, None].clamp_min(1e-15)) ** 2  # an element that never varies has r = 0
        return self

    def shrink(self, error: Tensor) -> Tensor | None:
        """Of an error r_t^2 (*batch or ones, *shape), along the basis; None where nothing has been learnt."""
        if self.basis is None:
            return None
        along = error.flatten(error.ndim - self.event_dim).double() @ self.weight
        return (1 / (1 + along[..., None, :] * self.seen)).mean(-2)

    def root(self, t: Tensor, like: Tensor) -> Tensor:
        """B (d, d) with B B^T = C_t at one time, in the dtype of `like`. Kept: a grid has few times."""
        key = float(t), like.dtype, like.device
        if key not in self._roots:
            eigenvalues, vectors = torch.linalg.eigh(self.covariance(t))  # type: ignore[misc]  # asked only where it is known
            self._roots[key] = (vectors * eigenvalues.clamp_min(0).sqrt()).to(like)
        return self._roots[key]

    def roots(self, error: Tensor, at: Tensor | None, x: Tensor) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Products with B and B^T for states x (M, *event): B = r element by element where no covariance is known."""
        if self.covariance is None:
            r = error.sqrt().to(x.dtype).reshape(x.shape)
            return (lambda u: r * u), (lambda v: r * v)
        times, which = at.unique(return_inverse=True)
        matrices = [self.root(time, x) for time in times]

        def product(u: Tensor, matrices: list[Tensor]) -> Tensor:
            return product_by_time(u.flatten(1), matrices, which).reshape(u.shape)

        return (lambda u: product(u, matrices)), (lambda v: product(v, [matrix.T for matrix in matrices]))

    def takes_double(self, x: Tensor, y: Tensor) -> bool:
        """Whether the misfit of float64 is float64, tried once, on one x and y."""
        if self._wide is None:
            one = x.reshape(-1, *x.shape[x.ndim - self.event_dim :])[:1]
            try:
                self._wide = self.misfit(one.double(), y[:1].double()).dtype == torch.float64
            except (RuntimeError, TypeError, ValueError):  # a network of float32, in most cases
                self._wide = False
        return self._wide

    def forward(self, x_0, y, error, at=None):
        shape, dtype, left = x_0.shape, x_0.dtype, self.shrink(error)
        x_0, y = (v.double() if self.takes_double(x_0, y) else v for v in (x_0, y))
        batch, event = shape[: x_0.ndim - self.event_dim], shape[x_0.ndim - self.event_dim :]
        at = None if at is None else at.expand(batch).reshape(-1)
        x, delta = x_0.reshape(-1, *event), None
        error = error.expand(shape).reshape(-1, *event)
        root, root_t = self.roots(error, at, x)

        def misfit(x):
            return self.misfit(x.reshape(shape), y).reshape(len(x), -1)

        for _ in range(self.rounds):
            value, pull = torch.func.vjp(misfit, x if delta is None else x + delta)  # type: ignore[misc]  # three only with has_aux

            def push(v, value=value, pull=pull):  # J v, as the derivative of u -> J^T u: every operator with a second derivative has it
                return torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(value))[1](v)[0]  # type: ignore[misc]

            def matrix(v, push=push, pull=pull):
                return v + root_t(pull(push(root(v)))[0])

            residual = -value if delta is None else push(delta) - value
            delta = root(conjugate_gradients(matrix, root_t(pull(residual)[0]), self.iterations))
            delta = clipped(delta, error, self.clip, self.event_dim)

        def slope():
            value, pull = torch.func.vjp(misfit, x + delta)  # type: ignore[misc]  # three only with has_aux
            return pull(-value)[0].reshape(shape).to(dtype)

        return Update(delta.reshape(shape).to(dtype), left, None if left is None else self.basis.to(dtype), slope=slope)


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """J (P, m, d) at x (P, *shape), of a function from (*batch, P, *shape) to (*batch, P, m): by rows or, if there are fewer, by columns,
    a few at once."""
    (P, m), d, parts = function(x).shape, x[0].numel(), []
    for unit in torch.eye(min(m, d), dtype=x.dtype, device=x.device).split(max(1, DENSE_LIMIT // (m * P))):
        value, pull = torch.func.vjp(function, x.expand(len(unit), *x.shape))  # type: ignore[misc]  # three only with has_aux
        unit = unit[:, None].expand(-1, P, -1)
        if m <= d:
            parts.append(pull(unit)[0].flatten(2))
        else:
            push = torch.func.vjp(lambda u, pull=pull: pull(u)[0], torch.zeros_like(value))[1]  # type: ignore[misc]
            parts.append(push(unit.reshape(*unit.shape[:2], *x.shape[1:]))[0])
    J = torch.cat(parts)
    return J.transpose(0, 1) if m <= d else J.permute(1, 2, 0)


def clipped(delta: Tensor, error: Tensor, clip: float | None, event_dim: int) -> Tensor:
    """A move (*batch, *shape), softly kept to a root mean square of `clip` times that of r_t, its direction kept; None: as it is."""
    if clip is None:
        return delta
    square = delta.square().flatten(delta.ndim - event_dim).mean(-1)
    bound = clip**2 * error.flatten(error.ndim - event_dim).mean(-1).to(delta.dtype)
    return delta * (1 + square / bound).rsqrt().reshape(*square.shape, *(1,) * event_dim)


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
