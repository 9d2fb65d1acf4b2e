r"""A Gaussian prior on tensors of any shape whose reverse transitions are exact.

x_0 ~ N(m, C), C = Q diag(lambda) Q^T, gives x_t ~ N(alpha_t m, S_t), S_t = alpha_t^2 C + sigma_t^2 I, and with x_t = a x_s + b n

    x_s | x_t ~ N(alpha_s m + a S_s S_t^{-1} (x_t - alpha_t m),  b^2 S_s S_t^{-1}).

All matrices are diagonal in the basis Q. The posterior of a linear Gaussian measurement is another such prior: the exact posterior,
itself a chain. (One component of `GaussianMixturePrior`; but a step that is one Gaussian needs no responsibilities, takes an x of any
shape, and costs two matrix products where d is large.)
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from priors.mixture import default_schedule, read_analytic, save_analytic
from rtb_inverse.chains import Prior
from rtb_inverse.checkpoints import WEIGHTS, load_into
from rtb_inverse.checks import check_choice, check_count, check_finite, check_fraction, check_positive
from rtb_inverse.distributions import GaussianStep
from rtb_inverse.schedules import CLEAN, Schedule, expand

KERNELS = {
    "matern": lambda r: (1 + 3**0.5 * r) * torch.exp(-(3**0.5) * r),  # smoothness 3/2: once differentiable
    "rbf": lambda r: torch.exp(-0.5 * r**2),
}


class GaussianPrior(Prior):
    """N(m, C) as an exact chain.

    Args:
        mean: m, (*batch, *shape); a leading batch (as `posterior` makes for several observations) must match the last batch axes of the
            states. Its dtype is that of the states.
        covariance: C, (d, d) with d the number of elements of x, symmetric and positive definite.
        shape: of one x; by default that of the mean.
        schedule: by default that of `GaussianMixturePrior`.
        steps: K.

    Attributes:
        eigenvalues, basis: lambda (d,) and Q (d, d), float64.

    Raises:
        ValueError: shapes that do not fit, a covariance that is not finite, symmetric or positive definite.
    """

    exact_reversal = True
    mean: Tensor
    eigenvalues: Tensor
    basis: Tensor

    def __init__(self, mean: Tensor, covariance: Tensor, shape=None, schedule: Schedule | None = None, steps: int = 40):
        shape = torch.Size(mean.shape if shape is None else shape)
        d = shape.numel()
        if mean.shape[mean.ndim - len(shape) :] != shape or mean.ndim < len(shape):
            raise ValueError(f"mean must have shape (*batch, {', '.join(map(str, shape))}), got {tuple(mean.shape)}")
        if covariance.shape != (d, d):
            raise ValueError(f"covariance must have shape (d, d) = {(d, d)} for x of shape {tuple(shape)}, got {tuple(covariance.shape)}")
        check_finite("mean", mean)
        covariance = check_finite("covariance", covariance).double()
        asymmetry = float((covariance - covariance.T).abs().max())
        if asymmetry > 1e-5 * float(covariance.abs().max()):
            raise ValueError(f"covariance must be symmetric, got entries that differ by {asymmetry:.3g} from their transposes")
        eigenvalues, basis = torch.linalg.eigh((covariance + covariance.T) / 2)
        if not (eigenvalues > 0).all():
            raise ValueError(f"covariance must be positive definite, got a smallest eigenvalue of {float(eigenvalues.min()):.3g}")
        super().__init__(shape, default_schedule() if schedule is None else schedule, steps, min_std=1e-6)
        self.register_buffer("mean", mean)
        self.register_buffer("eigenvalues", eigenvalues)
        self.register_buffer("basis", basis)

    @property
    def covariance(self) -> Tensor:
        return (self.basis * self.eigenvalues) @ self.basis.T

    def _gaussian(self, loc: Tensor, variance: Tensor) -> GaussianStep:
        """N(loc, Q diag(variance) Q^T): variance (*batch or ones, d), float64."""
        scale = variance.mean(-1).sqrt()
        ratio = (variance.sqrt() / scale[..., None]).to(loc.dtype)
        return GaussianStep(loc, expand(scale, loc), len(self.shape), self.basis.to(loc.dtype), ratio)

    @property
    def distribution(self) -> GaussianStep:
        """p(x_0) itself: exact draws and log-density."""
        return self._gaussian(self.mean, self.eigenvalues)

    def sample(self, n, generator=None, progress=False):
        """n exact draws (n, *shape), without the chain."""
        return self.distribution.sample((n,), generator)

    def _marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t (*t.shape), and the eigenvalues of S_t, (*t.shape, d)."""
        alpha_t, sigma_t = self.schedule.alpha_sigma(t.to(self.eigenvalues.device))
        return alpha_t, alpha_t[..., None] ** 2 * self.eigenvalues + sigma_t[..., None] ** 2

    def initial(self, sample_shape):
        alpha, variance = self._marginal(self.times[0])
        return self._gaussian((alpha.to(self.mean.dtype) * self.mean).expand(*sample_shape, *self.shape), variance)

    def transition(self, x_t, t, s, y=None):
        t, s = t.to(x_t.device), s.to(x_t.device)
        (alpha_t, var_t), (alpha_s, var_s) = self._marginal(t), self._marginal(s)
        a, b = (c[..., None] for c in self.schedule.forward_step(s, t))
        basis = self.basis.to(x_t.dtype)
        u = (x_t - expand(alpha_t, x_t) * self.mean).flatten(x_t.ndim - len(self.shape)) @ basis
        moved = ((a * var_s / var_t).to(x_t.dtype) * u) @ basis.T
        return self._gaussian(expand(alpha_s, x_t) * self.mean + moved.reshape(x_t.shape), b**2 * var_s / var_t)

    def denoise(self, x_t, t):
        return self.transition(x_t, t, t.new_tensor(CLEAN)).mean

    def _left(self, t: Tensor) -> Tensor:
        """Eigenvalues of C_t = Cov[x_0 | x_t], the same for all x_t, (*t.shape, d): lambda sigma_t^2 / (alpha_t^2 lambda + sigma_t^2)."""
        sigma_t = self.schedule.alpha_sigma(t.to(self.eigenvalues.device))[1][..., None]
        return self.eigenvalues * sigma_t**2 / self._marginal(t)[1]

    def denoiser_error(self, t):
        return (self._left(t) @ (self.basis**2).T).reshape(*t.shape, *self.shape)

    def denoiser_covariance(self, t):
        return (self.basis * self._left(t)) @ self.basis.T

    def local_covariance(self, x_t, t, rows):
        """In closed form, and constant in x_t."""
        columns = (self.basis * self._left(t)[..., None, :]) @ (self.basis.T @ rows.T.double())
        return columns.to(x_t.dtype).expand(*x_t.shape[: x_t.ndim - len(self.shape)], *columns.shape[-2:])

    def gaussian_covariance(self):
        return self.covariance

    def _observe(self, A: Tensor, noise_std, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A, the noise's covariance R, that of y, and y - A m; all in float64."""
        noise_std = torch.as_tensor(noise_std, dtype=torch.float64, device=A.device)
        if not (noise_std > 0).all():
            raise ValueError(f"noise_std must be above 0, got {noise_std.tolist()!r}")
        d = self.shape.numel()
        if A.ndim != 2 or A.shape[1] != d or y.shape[-1:] != A.shape[:1]:
            raise ValueError(f"A must have shape (m, {d}) and y (..., m), got {tuple(A.shape)} and {tuple(y.shape)}")
        A = A.double()
        R = torch.diag(noise_std.expand(len(A)) ** 2)
        mean = self.mean.flatten(self.mean.ndim - len(self.shape)).double()
        return A, R, A @ self.covariance @ A.T + R, y.double() - mean @ A.T

    def log_evidence(self, A: Tensor, noise_std, y: Tensor) -> Tensor:
        """Exact log p(y) for y = A vec(x) + noise_std n; A (m, d), noise_std > 0, a number or (m,), y (B, m) or (m,); returns (B,) or a
        number."""
        _, _, S, residual = self._observe(A, noise_std, y)
        return MultivariateNormal(torch.zeros_like(S[0]), S).log_prob(residual).to(self.mean.dtype)

    def posterior(self, A: Tensor, noise_std, y: Tensor) -> "GaussianPrior":
        """The exact posterior for y = A vec(x) + noise_std n, itself a chain on the same schedule.

        Args:
            A: (m, d). noise_std: > 0, a number or (m,). y: (m,), or (B, m): B means, which broadcast against states (N, B, *shape), and
                one covariance.
        """
        A, R, S, residual = self._observe(A, noise_std, y)
        C = self.covariance
        gain = torch.linalg.solve(S, A @ C).T
        shrink = torch.eye(len(C), dtype=C.dtype, device=C.device) - gain @ A
        covariance = shrink @ C @ shrink.T + gain @ R @ gain.T  # Joseph's form stays positive definite
        move = (residual @ gain.T).reshape(*residual.shape[:-1], *self.shape)
        return GaussianPrior((self.mean + move).to(self.mean.dtype), covariance, self.shape, self.schedule, self.steps)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write mean and eigenbasis (safetensors) and the chain's options."""
        save_analytic(self, folder, shape=list(self.shape), steps=self.steps)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "GaussianPrior":
        """Load what `save_pretrained` wrote."""
        tensors, options = read_analytic(folder)
        covariance = (tensors["basis"] * tensors["eigenvalues"]) @ tensors["basis"].T
        prior = cls(tensors["mean"], covariance, **options)
        load_into(prior, tensors, Path(folder) / WEIGHTS)  # the very eigenvectors, so that densities are equal to the last bit
        return prior

    @classmethod
    def process(
        cls, shape: int | tuple[int, ...] = 16, length_scale: float = 3.0, kernel: str = "matern", variance: float = 1.0,
        nugget: float = 1e-3, steps: int = 40, dtype: torch.dtype = torch.float32, **options,
    ) -> "GaussianPrior":  # fmt: skip
        """A stationary Gaussian process of mean 0 on a regular grid of spacing 1 (Rasmussen and Williams 2006, chapter 4).

        Args:
            shape: of one x, every axis one of the grid's; a number n stands for an image (1, n, n).
            length_scale: > 0, in grid cells. kernel: "matern" (of smoothness 3/2) or "rbf". variance: > 0, of each element.
            nugget: share of the variance that is white noise, in [0, 1]; it keeps the smallest eigenvalue of a smooth kernel off 0.
        """
        shape = (1, check_count("shape", shape), shape) if isinstance(shape, int) else tuple(check_count("shape", n) for n in shape)
        correlation = KERNELS[check_choice("kernel", kernel, KERNELS)]
        points = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in shape)).reshape(-1, len(shape))
        K = correlation(torch.cdist(points, points) / check_positive("length_scale", length_scale))
        nugget = check_fraction("nugget", nugget)
        K = (1 - nugget) * K + nugget * torch.eye(len(K), dtype=K.dtype)
        return cls(torch.zeros(shape, dtype=dtype), check_positive("variance", variance) * K, steps=steps, **options)
