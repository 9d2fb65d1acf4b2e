"""Guides of affine operators by their matrix: under an error of one level, of its average covariance, of that of the very state, and of
all that is left of a Gaussian x_0."""

from collections.abc import Callable

import torch
from torch import Tensor

from rtb_inverse.chains import Prior
from rtb_inverse.guidance.base import Guide, Update, affine, product_by_time
from rtb_inverse.problems import InverseProblem


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
    """A small affine operator as a matrix A (m, d), its offset, and sigma^2 / beta."""

    matrix: Tensor
    offset: Tensor
    noise_variance: Tensor
    basis: Tensor | None

    def __init__(self, problem: InverseProblem, beta: float):
        super().__init__()
        matrix, offset = affine(problem)
        std = problem.noise.std.expand(problem.y_shape).flatten().double()
        for name, value in {"matrix": matrix, "offset": offset, "noise_variance": std**2 / beta}.items():
            self.register_buffer(name, value, persistent=False)
        self.event_dim, self.beta = len(problem.shape), beta

    def see(self, problem: InverseProblem, unit: Tensor | None = None) -> None:
        """Keep the directions that y sees as the basis."""
        std = (self.beta * self.noise_variance).sqrt()
        self.register_buffer("basis", seen_directions(problem, self.matrix, std, unit), persistent=False)

    def residual(self, x_0: Tensor, y: Tensor) -> Tensor:
        """y - A(x_0), (*batch, m)."""
        matrix, offset = (c.to(x_0.device, x_0.dtype) for c in (self.matrix, self.offset))
        return y.reshape(len(y), -1) - offset - x_0.flatten(x_0.ndim - self.event_dim) @ matrix.T

    def slope(self, residual: Tensor) -> Tensor:
        """A^T (y - A(x)) / sigma^2, (*batch, d), of the likelihood that is not tempered."""
        weight = 1 / (self.beta * self.noise_variance)
        return residual * weight.to(residual) @ self.matrix.to(residual)


class CovarianceGuidance(AffineGuide):
    """A small affine operator and a known covariance C_t of the denoiser's error: the gain is C_t A^T (A C_t A^T + l^2 sigma^2)^{-1} for
    noise of level l. With W = 1 / sigma and W A C_t A^T W = U diag(lambda) U^T that is, at all levels,

        C_t A^T W U diag(1 / (lambda + l^2)) U^T W.

    The variance shrinks element by element where A picks elements, else along the singular vectors of the whitened A diag(r), for one r.

    Args:
        covariance: C_t (d, d) at one time t, float64.
        beta: inverse temperature of the likelihood.
        unit: r, (d,); by default all 1. That of the last step is best, where the elements' errors differ most.
    """

    def __init__(
        self, problem: InverseProblem, covariance: Callable[[Tensor], Tensor], beta: float = 1.0, unit: Tensor | None = None
    ):  # fmt: skip
        super().__init__(problem, beta)
        self.see(problem, unit)
        self.covariance = covariance
        self._known: dict[tuple[float, torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def at(self, x_t, t):
        return t

    def spectrum(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """At one time, of the r = min(m, d) directions of y that x can move: lambda (r,), U^T W (r, m), C_t A^T W U (d, r), and what 1 of
        1 / (lambda + l^2) takes from the variance along the basis (m, r) or of each element (d, r), in units of C_t's diagonal; the
        second and the third in `dtype`. Kept: a grid has few times."""
        key = float(t), dtype, self.matrix.device
        if key not in self._known:
            C, whiten = self.covariance(t), self.noise_variance.rsqrt()
            A = whiten[:, None] * self.matrix.double()
            eigenvalues, U = (part[..., -min(A.shape) :] for part in torch.linalg.eigh(A @ C @ A.T))
            pull = C @ A.T @ U
            variance = C.diagonal().clamp_min(1e-30)  # an element that never varies has none
            taken = pull.square() / variance[:, None]
            if self.basis is not None:
                along = self.basis / variance.sqrt()[:, None]
                taken = (along.T @ pull).square() / ((C @ along) * along).sum(0)[:, None]
            self._known[key] = eigenvalues.clamp_min(0), (U.T * whiten).to(dtype), pull.to(dtype), taken
        return self._known[key]

    def forward(self, x_0, y, error, at=None, noise: Tensor | None = None):
        """`noise`: l^2, float64, (B,); None: 1."""
        residual = self.residual(x_0, y)
        times, which = at.unique(return_inverse=True)
        known = [self.spectrum(time, x_0.dtype) for time in times]
        eigenvalues, whiten, pull, taken = ([part.to(x_0.device) for part in parts] for parts in zip(*known, strict=True))
        level = residual.new_ones((), dtype=torch.float64) if noise is None else noise
        of = (which,) if noise is None else (which, torch.arange(len(level), device=x_0.device))
        inverse = [1 / (value + level[..., None]) for value in eigenvalues]  # 1 / (lambda + l^2), (r,) or (B, r)
        shrink = torch.stack([1 - share @ part.T for share, part in zip(inverse, taken, strict=True)])[of].clamp_min(1e-9)
        states = which.expand(residual.shape[:-1])
        seen = product_by_time(residual, whiten, states) * torch.stack(inverse)[of].to(x_0.dtype)
        delta = product_by_time(seen, pull, states).reshape(x_0.shape)

        def slope():
            return self.slope(self.residual(x_0 + delta, y)).reshape(x_0.shape)

        if self.basis is not None:
            return Update(delta, shrink, self.basis.to(x_0.device, x_0.dtype), slope=slope)
        return Update(delta, shrink.reshape(*shrink.shape[:-1], *x_0.shape[x_0.ndim - self.event_dim :]), slope=slope)


class LocalGuidance(AffineGuide):
    """A small affine operator and a prior whose covariance C(x_t) = Cov[x_0 | x_t] is cheap: exact where x_0 given x_t is Gaussian.

    Args:
        covariance: (x_t, t, A (m, d)) to C(x_t) A^T, (*batch, d, m).
    """

    def __init__(self, problem: InverseProblem, covariance: Callable[[Tensor, Tensor, Tensor], Tensor], beta: float = 1.0):
        super().__init__(problem, beta)
        self.see(problem)
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
        variance, basis = torch.linalg.eigh((left + left.T) / 2)
        self.register_buffer("basis", basis, persistent=False)
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
