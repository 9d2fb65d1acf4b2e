r"""How an observation moves the denoiser's estimate of x_0.

Take x_0 ~ N(x0hat, r^2) (the denoiser's error) and y = A(x_0) + sigma n. The Gaussian update is

    x0hat + r^2 J^T (r^2 J J^T + sigma^2)^{-1} (y - A(x0hat)),   J = dA/dx at x0hat,

and it leaves the variance r^2 sigma^2 / (r^2 s^2 + sigma^2) along a singular vector of J with singular value s. It needs no
derivative of the network. (The estimate of Song et al. 2023, PiGDM, without its network Jacobian.) Where the whole covariance C_t of
the error is known, it stands in place of r^2 I: then what is seen moves what is not. Where the prior is cheap, it is that of the very
state, C(x_t) (Boys et al. 2023, arXiv 2310.06721); where x_0 is Gaussian, the whole of what is left is known and the guided chain is exact.

A guide is called in two parts: `at` says once what is known of a state, and `forward` moves any estimate there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rtb_inverse.chains import Prior
from rtb_inverse.noise import GaussianNoise
from rtb_inverse.noise_range import NoiseRange
from rtb_inverse.problems import InverseProblem

DENSE_LIMIT = 2**22  # elements of a matrix that is kept
TOLD = 1e-6  # of what y tells of the direction of which it tells most: directions below are taken for unseen
COVARIANCE_LIMIT = 2**20  # of a gain that is kept for each of the K times
LOCAL_LIMIT = 2**12  # of a gain made for each state


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


class MaskGuidance(Guide):
    """The operator picks elements of x: the update is exact element by element."""

    mask: Tensor
    noise_variance: Tensor

    def __init__(self, problem: InverseProblem):
        super().__init__()
        self.register_buffer("mask", problem.mask, persistent=False)
        std = torch.zeros(problem.shape, dtype=problem.noise.std.dtype, device=problem.mask.device)
        std[problem.mask] = problem.noise.std.expand(problem.y_shape).flatten()
        self.register_buffer("noise_variance", std.double() ** 2, persistent=False)

    def forward(self, x_0, y, error, at=None):
        weight = torch.where(self.mask, 1 / (error + self.noise_variance), torch.zeros_like(error))
        image = y.new_zeros((len(y), *self.mask.shape))
        image[:, self.mask] = y.flatten(1)
        gain, residual = error * weight, image - x_0
        return Update(gain.to(x_0.dtype) * residual, 1 - gain, slope=lambda: weight.to(x_0.dtype) * residual)


class ElementGuidance(Guide):
    """Each element is seen by itself, in whatever way: with the likelihood smoothed by the denoiser's error (`problem.smoothed`),

        log Z(x0hat) = log int N(x; x0hat, r^2) p(y | x) dx,

    the update is exact, by Tweedie's formulas: delta = r^2 d log Z / d x0hat, and the variance r^2 + r^4 d^2 log Z / d x0hat^2 is left.
    It follows y also where the likelihood's own gradient is 0 (HDR).
    """

    def __init__(self, problem: InverseProblem):
        super().__init__()
        self.smoothed = problem.smoothed

    def forward(self, x_0, y, error, at=None):
        def slope(mean):
            return torch.func.grad(lambda m: self.smoothed(m, y.double(), error).sum())(mean)

        first, pull = torch.func.vjp(slope, x_0.double())  # type: ignore[misc]  # three only with has_aux
        (second,) = pull(torch.ones_like(first))  # the elements do not see each other
        delta, shrink = (error * first).to(x_0.dtype), (1 + error * second).clamp_min(1e-6)
        return Update(delta, shrink, slope=lambda: first.to(x_0.dtype))


def affine(problem: InverseProblem) -> tuple[Tensor, Tensor]:
    """The matrix (m, d) and the offset (m,) of an affine operator."""
    operator = problem.operator if isinstance(problem.operator, nn.Module) else nn.Identity()
    own = (c.dtype for c in (*operator.parameters(), *operator.buffers()) if c.is_floating_point())
    zero = torch.zeros((1, *problem.shape), device=problem.noise.std.device, dtype=next(own, torch.get_default_dtype()))
    with torch.no_grad():
        offset = problem(zero)[0].flatten()
        columns = torch.eye(zero.numel(), device=zero.device, dtype=zero.dtype).reshape(-1, *problem.shape)
        return torch.cat([problem(part).reshape(len(part), -1) - offset for part in columns.split(256)]).T, offset


def seen_directions(problem: InverseProblem, matrix: Tensor, std: Tensor, unit: Tensor | None = None) -> Tensor | None:
    """Singular vectors of the whitened matrix, (d, m), float64, for x in units (d,) of its elements; None where it picks elements of x."""
    if problem.mask is not None:
        return None
    matrix = matrix.double() if unit is None else matrix.double() * unit
    return torch.linalg.svd(matrix / std.double()[:, None], full_matrices=False)[2].T.contiguous()


class DenseGuidance(Guide):
    """A small affine operator: the update is exact by the singular value decomposition of its whitened matrix.
    The errors of the elements are averaged to one level."""

    basis: Tensor
    singular: Tensor
    whiten: Tensor
    offset: Tensor

    def __init__(self, problem: InverseProblem):
        super().__init__()
        matrix, offset = affine(problem)
        std = problem.noise.std.expand(problem.y_shape).flatten()
        self.event_dim = len(problem.shape)
        U, S, Vh = torch.linalg.svd((matrix / std[:, None]).double(), full_matrices=False)
        self.register_buffer("basis", Vh.T.to(matrix.dtype).contiguous(), persistent=False)
        self.register_buffer("singular", S, persistent=False)
        self.register_buffer("whiten", (U.T / std).to(matrix.dtype), persistent=False)  # y to U^T y / sigma
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, x_0, y, error, at=None):
        level = error.flatten(error.ndim - self.event_dim).mean(-1, keepdim=True)
        shrink = 1 / (level * self.singular**2 + 1)
        basis, whiten, offset = (c.to(x_0.dtype) for c in (self.basis, self.whiten, self.offset))
        known = x_0.flatten(x_0.ndim - self.event_dim) @ basis * self.singular.to(x_0.dtype)
        move = (level * self.singular * shrink).to(x_0.dtype) * ((y.reshape(len(y), -1) - offset) @ whiten.T - known)
        delta = (move @ basis.T).reshape(x_0.shape)
        whole = level.reshape(*level.shape[:-1], *(1,) * self.event_dim).to(x_0.dtype)
        return Update(delta, shrink, basis, slope=lambda: delta / whole)


class AffineGuide(Guide):
    """A small affine operator as a matrix A (m, d), its offset, sigma^2 / beta, and the directions it sees."""

    matrix: Tensor
    offset: Tensor
    noise_variance: Tensor
    basis: Tensor | None

    def __init__(self, problem: InverseProblem, beta: float, unit: Tensor | None = None):
        super().__init__()
        matrix, offset = affine(problem)
        std = problem.noise.std.expand(problem.y_shape).flatten().double()
        basis = seen_directions(problem, matrix, std, unit)
        for name, value in {"matrix": matrix, "offset": offset, "noise_variance": std**2 / beta, "basis": basis}.items():
            self.register_buffer(name, value, persistent=False)
        self.event_dim, self.beta = len(problem.shape), beta

    def residual(self, x_0: Tensor, y: Tensor) -> Tensor:
        """y - A(x_0), (*batch, m)."""
        matrix, offset = (c.to(x_0.device, x_0.dtype) for c in (self.matrix, self.offset))
        return y.flatten(1) - offset - x_0.flatten(x_0.ndim - self.event_dim) @ matrix.T

    def slope(self, residual: Tensor) -> Tensor:
        """A^T (y - A(x)) / sigma^2, (*batch, d), of the likelihood that is not tempered."""
        weight = 1 / (self.beta * self.noise_variance)
        return residual * weight.to(residual) @ self.matrix.to(residual)


class CovarianceGuidance(AffineGuide):
    """A small affine operator and a known covariance C_t of the denoiser's error: the gain is C_t A^T (A C_t A^T + sigma^2)^{-1}. The
    variance shrinks element by element where A picks elements, else along the singular vectors of the whitened A diag(r), for one r.

    Args:
        covariance: C_t (d, d) at one time t, float64.
        beta: inverse temperature of the likelihood.
        unit: r, (d,); by default all 1. That of the last step is best, where the elements' errors differ most.
    """

    def __init__(
        self, problem: InverseProblem, covariance: Callable[[Tensor], Tensor], beta: float = 1.0, unit: Tensor | None = None
    ):  # fmt: skip
        super().__init__(problem, beta, unit)
        self.covariance = covariance
        self._known: dict[float, tuple[Tensor, Tensor]] = {}

    def at(self, x_t, t):
        return t

    def gain(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """At one time: the gain (d, m), and the share of the variance that is left: along the basis (m,), in units of C_t's diagonal, or of
        each element (d,). Kept: a grid has few times."""
        if float(t) not in self._known:
            C, A = self.covariance(t), self.matrix.double()
            S = A @ C @ A.T + torch.diag(self.noise_variance)
            gain = torch.linalg.solve(S, A @ C).T
            left = C - gain @ A @ C
            variance = C.diagonal().clamp_min(1e-30)  # an element that never varies has none
            if self.basis is None:
                shrink = left.diagonal() / variance
            else:
                along = self.basis / variance.sqrt()[:, None]
                shrink = ((left @ along) * along).sum(0) / ((C @ along) * along).sum(0)
            self._known[float(t)] = gain.to(self.matrix.dtype), shrink.clamp_min(1e-9)
        return self._known[float(t)]

    def forward(self, x_0, y, error, at=None):
        residual = self.residual(x_0, y)
        times, which = at.unique(return_inverse=True)
        known = [self.gain(time) for time in times]
        gains, shrinks = [gain.to(x_0.device, x_0.dtype) for gain, _ in known], [shrink for _, shrink in known]
        delta = product_by_time(residual, gains, which.expand(residual.shape[:-1]))
        delta, shrink = delta.reshape(x_0.shape), torch.stack(shrinks).to(x_0.device)[which]

        def slope():
            return self.slope(self.residual(x_0 + delta, y)).reshape(x_0.shape)

        if self.basis is not None:
            return Update(delta, shrink, self.basis.to(x_0.device, x_0.dtype), slope=slope)
        return Update(delta, shrink.reshape(*at.shape, *x_0.shape[x_0.ndim - self.event_dim :]), slope=slope)


def product_by_time(states: Tensor, matrices: list[Tensor], which: Tensor) -> Tensor:
    """Each state (*batch, d) times the matrix (e, d) of its time, `which` (*batch) of them: (*batch, e). One product for all states of one
    time."""
    if len(matrices) == 1:
        return states @ matrices[0].T
    out = states.new_empty((*states.shape[:-1], len(matrices[0])))
    for i, matrix in enumerate(matrices):
        out[which == i] = states[which == i] @ matrix.T
    return out


class LocalGuidance(AffineGuide):
    """A small affine operator and a prior whose covariance C(x_t) = Cov[x_0 | x_t] is cheap: exact where x_0 given x_t is Gaussian.

    Args:
        covariance: (x_t, t, A (m, d)) to C(x_t) A^T, (*batch, d, m).
    """

    def __init__(self, problem: InverseProblem, covariance: Callable[[Tensor, Tensor, Tensor], Tensor], beta: float = 1.0):
        super().__init__(problem, beta)
        self.covariance = covariance

    def at(self, x_t, t):
        """The gain C A^T (A C A^T + sigma^2)^{-1}, (*batch, d, m)."""
        A = self.matrix.to(x_t.dtype)
        CA = self.covariance(x_t, t, A)
        S = A @ CA + torch.diag(self.noise_variance.to(x_t.dtype))
        return torch.linalg.solve(S, CA, left=False)

    def forward(self, x_0, y, error, at=None):
        return Update((at @ self.residual(x_0, y)[..., None])[..., 0].reshape(x_0.shape))


class GaussianGuidance(AffineGuide):
    """A small affine operator and a Gaussian prior N(m, C): the steps are those of the exact posterior chain. With
    C_y = (C^{-1} + A^T A / sigma^2)^{-1} = V diag(c) V^T, what is left once x_t is seen too has the same eigenvectors at all times,

        Cov[x_0 | x_t, y] = V diag(c sigma_t^2 / (alpha_t^2 c + sigma_t^2)) V^T,

    and the gain is Cov[x_0 | x_t, y] A^T / sigma^2.
    """

    exact = True
    variance: Tensor
    prior_variance: Tensor
    prior_basis: Tensor
    pull: Tensor

    def __init__(self, problem: InverseProblem, prior: Prior, beta: float = 1.0):
        super().__init__(problem, beta)
        self.schedule = prior.schedule
        A, C = self.matrix.double(), prior.gaussian_covariance()
        gain = torch.linalg.solve(A @ C @ A.T + torch.diag(self.noise_variance), A @ C).T
        left = C - gain @ A @ C
        for name, value in zip(("prior_variance", "prior_basis"), torch.linalg.eigh(C), strict=True):
            self.register_buffer(name, value, persistent=False)
        variance, self.basis = torch.linalg.eigh((left + left.T) / 2)
        self.register_buffer("variance", variance.clamp_min(1e-12), persistent=False)
        self.register_buffer("pull", self.basis.T @ A.T / self.noise_variance, persistent=False)

    def at(self, x_t, t):
        """Eigenvalues of Cov[x_0 | x_t, y], (*t.shape, d)."""
        return self._left(self.variance, t)

    def covariance(self, t: Tensor) -> Tensor:
        """Cov[x_0 | x_t], without y: (*t.shape, d, d)."""
        return (self.prior_basis * self._left(self.prior_variance, t)[..., None, :]) @ self.prior_basis.T

    def _left(self, variance: Tensor, t: Tensor) -> Tensor:
        """What x_t leaves of the variances (d,) of x_0: (*t.shape, d)."""
        alpha, sigma = (c[..., None] for c in self.schedule.alpha_sigma(t.to(variance.device)))
        return variance * sigma**2 / (alpha**2 * variance + sigma**2)

    def forward(self, x_0, y, error, at=None):
        basis, pull, level = self.basis.to(x_0.dtype), self.pull.to(x_0.dtype), at.mean(-1)
        delta = (self.residual(x_0, y) @ pull.T * at.to(x_0.dtype)) @ basis.T
        return Update(delta.reshape(x_0.shape), at / level[..., None], basis, level)


class GradientGuidance(Guide):
    """Any differentiable operator, and any noise that knows its mean and its variance: the update by a few steps of conjugate gradients on

        (r^-2 + J^T C^-1 J) delta = J^T C^-1 (y - m),      m = E[y | A(x0hat)],  C = Var[y | A(x0hat)],  J = dm/dx,

    with products by J and J^T only: for Gaussian noise m = A(x0hat) and C = sigma^2, for another one the Gaussian of its mean and its
    variance at the estimate. One step is the gradient with the best step size of the linearised problem. Where the covariance C_t of the
    denoiser's error is known, it stands in place of r^2 I.

    Where m is not affine or C not fixed, delta is clipped softly to a root mean square of `clip` times the denoiser's error, and m is
    linearised `rounds` times, each time where the last delta led (Gauss-Newton: J, m and C at x0hat + delta, and J delta added to y - m).

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
        self._roots: dict[float, Tensor] = {}
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
        if float(t) not in self._roots:
            eigenvalues, vectors = torch.linalg.eigh(self.covariance(t))  # type: ignore[misc]  # asked only where it is known
            self._roots[float(t)] = (vectors * eigenvalues.clamp_min(0).sqrt()).to(like)
        return self._roots[float(t)].to(like)

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

    def forward(self, x_0, y, error, at=None):
        shape, left = x_0.shape, self.shrink(error)
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
            return pull(-value)[0].reshape(shape)

        return Update(delta.reshape(shape), left, None if left is None else self.basis.to(x_0.dtype), slope=slope)


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


class LevelGuidance(Guide):
    """Each observation has its own noise level l, which y carries: noise of variance l^2 sigma^2 under an error r^2 moves the estimate, and
    shrinks its variance, as sigma^2 under r^2 / l^2 does. So the guide of level 1 serves them all, if its update is linear in y."""

    per_observation = True

    def __init__(self, problem: NoiseRange, guide: Guide, event_dim: int):
        super().__init__()
        self.problem, self.guide, self.event_dim = problem, guide, event_dim

    def at(self, x_t, t):
        return self.guide.at(x_t, t)

    def forward(self, x_0, y, error, at=None):
        measurement, log_level = self.problem.split(y)
        level = log_level.double().exp().reshape(-1, *(1,) * self.event_dim)
        update = self.guide(x_0, measurement, error / level**2, at)
        own = update.slope
        return replace(update, slope=None if own is None else lambda: own() / level.to(x_0.dtype) ** 2)


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


def guidance(
    problem: InverseProblem, decode: Callable[[Tensor], Tensor] | None = None, event_dim: int | None = None,
    covariance: Callable[[Tensor], Tensor] | None = None,
) -> Guide | None:  # fmt: skip
    """The best Gaussian update that the problem allows; None for a reward, a noise that knows neither mean nor variance, or an operator
    without gradients, where the problem has no `smoothed` likelihood.

    Args:
        problem: bound to its shape.
        decode: from chain space to data space, where that is not the identity; `event_dim` is then the number of axes of one x there.
        covariance: of the denoiser's error, where it is known, for a guide by gradients.
    """
    if problem.smoothed is not None and decode is None:
        return ElementGuidance(problem)
    if isinstance(problem, NoiseRange):
        guide = guidance(problem.operator, decode, event_dim)
        if isinstance(guide, MaskGuidance | DenseGuidance):
            return LevelGuidance(problem, guide, len(problem.shape))
    if not problem.whitens or not problem.differentiable:
        return None
    if decode is not None:
        small = {"iterations": 5, "rounds": 2, "covariance": covariance} if covariance is not None else {"iterations": 1}
        return GradientGuidance(problem, decode=decode, event_dim=event_dim, **small)
    gaussian = isinstance(problem.noise, GaussianNoise)
    if gaussian and problem.mask is not None:
        return MaskGuidance(problem)
    if not problem.linear:
        return GradientGuidance(problem, iterations=5, rounds=2, covariance=covariance)
    if gaussian and problem.shape.numel() * problem.y_shape.numel() <= DENSE_LIMIT:
        return DenseGuidance(problem)
    return GradientGuidance(problem, iterations=5, clip=None if gaussian else 3.0, covariance=covariance)


def covariance_guidance(problem: InverseProblem, prior: Prior, beta: float) -> Guide | None:
    """Where the prior knows the covariance of its error: of a small affine operator at each state, or on average, which also serves
    operators that are not affine, noise that is not Gaussian, and latents; else None."""
    if not problem.whitens:
        return None
    if prior.decodes or not isinstance(problem.noise, GaussianNoise) or not problem.linear:
        small = prior.shape.numel() ** 2 <= COVARIANCE_LIMIT
        if prior.exact_reversal or not small or prior.denoiser_covariance(prior.times[0]) is None:
            return None
        decode = prior.decode if prior.decodes else None
        return guidance(problem, decode, len(prior.shape), lambda t: beta * prior.denoiser_covariance(t))
    size = problem.shape.numel() * problem.y_shape.numel()
    if size <= COVARIANCE_LIMIT and prior.gaussian_covariance() is not None:
        return GaussianGuidance(problem, prior, beta)
    if prior.exact_reversal and size <= LOCAL_LIMIT:
        return LocalGuidance(problem, prior.local_covariance, beta)
    if size > COVARIANCE_LIMIT or prior.denoiser_covariance(prior.times[0]) is None:
        return None
    unit = prior.denoiser_covariance(prior.times[-2]).diagonal().clamp_min(1e-30).sqrt()
    return CovarianceGuidance(problem, prior.denoiser_covariance, beta, unit)
