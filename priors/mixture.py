r"""A Gaussian mixture whose reverse transitions are exact.

x_0 ~ sum_j w_j N(m_j, C_j) gives x_t | j ~ N(alpha_t m_j, S_t), S_t = alpha_t^2 C_j + sigma_t^2 I, and with x_t = a x_s + b n

    x_s | x_t, j ~ N(alpha_s m_j + a S_s S_t^{-1} (x_t - alpha_t m_j),  b^2 S_s S_t^{-1}),    weights w_j N(x_t; alpha_t m_j, S_t).

All matrices share the eigenvectors of C_j, so they are diagonal in that basis. Samples are exact at any number of steps, and the
posterior of a linear Gaussian measurement is another mixture: the exact posterior, itself a chain.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtb_inverse.chains import Prior
from rtb_inverse.checkpoints import WEIGHTS, load_into, load_weights, read_json, save_tensors, write_json
from rtb_inverse.checks import check_positive
from rtb_inverse.denoiser_error import DenoiserError
from rtb_inverse.distributions import SeededDistribution
from rtb_inverse.randomness import seeded, standard_normal, uniform
from rtb_inverse.schedules import CLEAN, Schedule, VariancePreserving, schedule_from_config


def into_basis(x: Tensor, basis: Tensor) -> Tensor:
    """Q_j^T x for all j: x (*batch, d), basis (J, d, d) or (*batch, J, d, d), to (*batch, J, d)."""
    if basis.ndim > 3:
        return torch.einsum("...jde,...d->...je", basis, x)
    J, d, _ = basis.shape
    return (x @ basis.transpose(0, 1).reshape(d, J * d)).unflatten(-1, (J, d))  # one matrix product


def from_basis(z: Tensor, basis: Tensor) -> Tensor:
    """sum_j Q_j z_j: z (*batch, J, d) to (*batch, d)."""
    if basis.ndim > 3:
        return torch.einsum("...jde,...je->...d", basis, z)
    return z.flatten(-2) @ basis.transpose(1, 2).flatten(0, 1)


def default_schedule() -> Schedule:
    """The variance-preserving scaled linear one, which has many steps at the high noise where a mixture of far modes decides among them,
    rescaled to end in pure noise."""
    return VariancePreserving(
        beta_schedule="scaled_linear", timestep_spacing="trailing", prediction_type="sample", rescale_betas_zero_snr=True
    )


def save_analytic(prior: Prior, folder: str | Path, **options) -> None:
    """Write the tensors (safetensors) of a prior without network, its schedule and the other options of its constructor (JSON)."""
    content = {"_class_name": type(prior).__name__, "schedule": prior.schedule.config(), "options": options}
    write_json(content, Path(folder) / "config.json")
    save_tensors(prior.state_dict(), Path(folder) / WEIGHTS)


def read_analytic(folder: str | Path) -> tuple[dict[str, Tensor], dict]:
    """What `save_analytic` wrote: tensors, and options with the schedule among them."""
    config = read_json(Path(folder) / "config.json")
    return load_weights(Path(folder) / WEIGHTS), {**config["options"], "schedule": schedule_from_config(config["schedule"])}


class GaussianMixture(SeededDistribution):
    """sum_j softmax(logits)_j N(Q_j c_j, Q_j diag(scale_j^2) Q_j^T).

    Args:
        logits: (*batch, J).
        centre: c, means in the coordinates of the basis, (*batch, J, d).
        scale: > 0, broadcastable to (*batch, J, d).
        basis: Q, orthonormal columns, (J, d, d) or (*batch, J, d, d).
    """

    def __init__(self, logits: Tensor, centre: Tensor, scale: Tensor, basis: Tensor):
        self.logits, self.centre, self.scale, self.basis = logits.log_softmax(-1), centre, scale, basis
        super().__init__(centre.shape[:-2], centre.shape[-1:], validate_args=False)

    def sample(self, sample_shape=torch.Size(), generator=None):
        shape = torch.Size(sample_shape) + self.batch_shape
        J, d = self.centre.shape[-2:]
        u = uniform((*shape, J), self.centre, generator).clamp_min(1e-30)
        j = (self.logits - (-u.log()).log()).argmax(-1)  # Gumbel's way to draw from softmax(logits)
        pick = j[..., None, None].expand(*shape, 1, d)
        centre, scale = (c.expand(*shape, J, d).gather(-2, pick)[..., 0, :] for c in (self.centre, self.scale))
        z = centre + scale * standard_normal(self.centre, generator, (*shape, d))
        if self.basis.ndim == 3:
            return torch.einsum("...de,...e->...d", self.basis[j], z)
        basis = self.basis.expand(*shape, J, d, d).gather(-3, pick[..., None].expand(*shape, 1, d, d))[..., 0, :, :]
        return torch.einsum("...de,...e->...d", basis, z)

    def log_prob(self, x):
        z = (into_basis(x, self.basis) - self.centre) / self.scale
        log_density = (-0.5 * z**2 - self.scale.log()).sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)
        return (self.logits + log_density).logsumexp(-1)

    @property
    def mean(self):
        return from_basis(self.logits.exp()[..., None] * self.centre, self.basis)

    @property
    def variance(self):
        within = torch.einsum("...jde,...je->...jd", self.basis**2, (self.scale**2).expand(self.centre.shape))
        spread = (torch.einsum("...jde,...je->...jd", self.basis, self.centre) - self.mean[..., None, :]) ** 2
        return torch.einsum("...j,...jd->...d", self.logits.exp(), within + spread)


class GaussianMixturePrior(Prior):
    """The mixture sum_j w_j N(m_j, C_j) as an exact chain in R^d.

    Args:
        weights: (*batch, J), > 0; normalised here. means: (*batch, J, d). covariances: (*batch, J, d, d) or (J, d, d), positive definite.
        schedule: by default `default_schedule()`.
        steps: K.

    A leading batch (as `posterior` makes for several observations) must match the last batch axes of the states.

    Raises:
        ValueError: shapes that do not fit, weights that are not positive, a covariance that is not positive definite.
    """

    exact_reversal = True
    log_weights: Tensor
    means: Tensor
    eigenvalues: Tensor
    basis: Tensor

    def __init__(
        self, weights: Tensor, means: Tensor, covariances: Tensor, schedule: Schedule | None = None, steps: int = 40, eta: float = 1.0,
        variance: str = "analytic", min_std: float = 1e-3,
    ):  # fmt: skip
        schedule = default_schedule() if schedule is None else schedule
        if means.ndim < 2 or weights.shape != means.shape[:-1]:
            raise ValueError(
                f"weights must have shape (*batch, J) and means (*batch, J, d), got {tuple(weights.shape)} and {tuple(means.shape)}"
            )
        if covariances.shape[-3:] != (*means.shape[-2:], means.shape[-1]):
            expected = (*means.shape[-2:], means.shape[-1])
            raise ValueError(f"covariances must have shape (..., J, d, d) = {expected}, got {tuple(covariances.shape)}")
        if not (weights > 0).all() or not torch.isfinite(weights).all():
            raise ValueError("weights must be finite and above 0, got one that is not")
        eigenvalues, basis = torch.linalg.eigh(covariances)
        if not (eigenvalues > 0).all():
            raise ValueError(f"covariances must be positive definite, got a smallest eigenvalue of {float(eigenvalues.min()):.3g}")
        super().__init__(means.shape[-1:], schedule, steps, eta, variance, min_std)
        self.register_buffer("log_weights", weights.log().log_softmax(-1))
        self.register_buffer("means", means)
        self.register_buffer("eigenvalues", eigenvalues)
        self.register_buffer("basis", basis)
        self._measured: DenoiserError | None = None

    @property
    def covariances(self) -> Tensor:
        return (self.basis * self.eigenvalues[..., None, :]) @ self.basis.mT

    @property
    def centres(self) -> Tensor:
        """The means in the coordinates of the eigenvectors."""
        return torch.einsum("...jde,...jd->...je", self.basis, self.means)

    @property
    def distribution(self) -> GaussianMixture:
        """p(x_0) itself: exact draws and log-density."""
        return GaussianMixture(self.log_weights, self.centres, self.eigenvalues.sqrt(), self.basis)

    def sample(self, n, generator=None, progress=False):
        """n exact draws (n, d), without the chain."""
        return self.distribution.sample((n,), generator)

    def _marginal_variance(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t, and the eigenvalues of S_t; both with axes for (J, d)."""
        alpha_t, sigma_t = (c.to(like)[..., None, None] for c in self.schedule.alpha_sigma(t))
        return alpha_t, alpha_t**2 * self.eigenvalues + sigma_t**2

    def initial(self, sample_shape):
        alpha, variance = self._marginal_variance(self.times[0], self.means)
        J, d = self.means.shape[-2:]
        centre = (alpha * self.centres).expand(*sample_shape, J, d)
        return GaussianMixture(self.log_weights.expand(*sample_shape, J), centre, variance.sqrt(), self.basis)

    def transition(self, x_t, t, s, y=None):
        alpha_t, var_t = self._marginal_variance(t, x_t)
        alpha_s, var_s = self._marginal_variance(s, x_t)
        a, b = (c.to(x_t)[..., None, None] for c in self.schedule.forward_step(s, t))
        centres = self.centres
        u = into_basis(x_t, self.basis) - alpha_t * centres
        logits = self.log_weights - 0.5 * (u**2 / var_t + var_t.log()).sum(-1)
        return GaussianMixture(logits, alpha_s * centres + a * var_s / var_t * u, b * (var_s / var_t).sqrt(), self.basis)

    def denoise(self, x_t, t):
        return self.transition(x_t, t, t.new_tensor(CLEAN)).mean

    def local_covariance(self, x_t, t, rows):
        """In closed form: the components' own covariances and the spread of their means."""
        given = self.transition(x_t, t, t.new_tensor(CLEAN))
        centres = given.centre - into_basis(given.mean, given.basis)
        along = torch.einsum("...jde,md->m...je", given.basis, rows)
        along = along.reshape(len(rows), *(1,) * (centres.ndim + 1 - along.ndim), *along.shape[1:])
        columns = given.scale**2 * along + centres * (centres * along).sum(-1, keepdim=True)
        return from_basis(given.logits.exp()[..., None] * columns, given.basis).movedim(0, -1)

    @property
    def error(self) -> DenoiserError:
        """Measured once, on 4,096 exact draws."""
        if self._measured is None:
            generator = torch.Generator(self.means.device).manual_seed(0)
            x_0 = self.distribution.sample((4096,), generator)
            options = {"event_dim": 1, "knots": 128, "factor_knots": 32, "rank": self.shape[0]}
            self._measured = DenoiserError.measure(self.schedule, self.denoise, x_0, generator=generator, **options)
        return self._measured

    def denoiser_error(self, t):
        return self.error(t)

    def denoiser_covariance(self, t):
        return self.error.covariance(t)

    def _observe(self, A: Tensor, noise_std, y: Tensor):
        noise_std = torch.as_tensor(noise_std, dtype=A.dtype, device=A.device)
        if not (noise_std > 0).all():
            raise ValueError(f"noise_std must be above 0, got {noise_std.tolist()!r}")
        if A.shape[-1:] != self.shape or y.shape[-1:] != A.shape[:1]:
            raise ValueError(f"A must have shape (m, {self.shape[0]}) and y (..., m), got {tuple(A.shape)} and {tuple(y.shape)}")
        C = self.covariances
        S = A @ C @ A.mT + torch.diag_embed(noise_std.expand(len(A)) ** 2)
        residual = y[..., None, :] - self.means @ A.mT
        evidence = torch.distributions.MultivariateNormal(torch.zeros_like(residual), S).log_prob(residual)
        return C, S, residual, self.log_weights + evidence

    def log_evidence(self, A: Tensor, noise_std, y: Tensor) -> Tensor:
        """Exact log p(y) for y = A x + noise_std n; A (m, d), y (B, m) or (m,); returns (B,) or a number."""
        return self._observe(A, noise_std, y)[3].logsumexp(-1)

    def posterior(self, A: Tensor, noise_std, y: Tensor) -> "GaussianMixturePrior":
        """The exact posterior mixture for y = A x + noise_std n, itself a chain on the same schedule.

        Args:
            A: (m, d). noise_std: > 0, a number or (m,). y: (m,), or (B, m) for a batch of mixtures that broadcast against states (N, B, d).
        """
        C, S, residual, log_weights = self._observe(A, noise_std, y)
        gain = torch.linalg.solve(S, A @ C).mT
        means = self.means + torch.einsum("...jdm,...jm->...jd", gain, residual)
        shrink = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device) - gain @ A
        R = torch.diag_embed((torch.as_tensor(noise_std, dtype=A.dtype, device=A.device).expand(len(A))) ** 2)
        covariances = shrink @ C @ shrink.mT + gain @ R @ gain.mT  # Joseph's form stays positive definite
        log_weights = log_weights.log_softmax(-1).clamp_min(math.log(torch.finfo(A.dtype).tiny))
        return GaussianMixturePrior(
            log_weights.exp(), means, (covariances + covariances.mT) / 2, self.schedule, self.steps, self.eta, self.variance, self.min_std
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the mixture (safetensors) and its chain's options."""
        save_analytic(self, folder, steps=self.steps, eta=self.eta, variance=self.variance, min_std=self.min_std)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "GaussianMixturePrior":
        """Load what `save_pretrained` wrote."""
        tensors, options = read_analytic(folder)
        covariances = (tensors["basis"] * tensors["eigenvalues"][..., None, :]) @ tensors["basis"].mT
        prior = cls(tensors["log_weights"].exp(), tensors["means"], covariances, **options)
        load_into(prior, tensors, Path(folder) / WEIGHTS)  # the very eigenvectors, so that densities are equal to the last bit
        return prior

    @classmethod
    def random(
        cls, d: int, components: int = 25, seed: int = 0, dtype: torch.dtype = torch.float32, steps: int = 40, **options
    ) -> "GaussianMixturePrior":
        """A mixture for tests and benchmarks: means N(0, 4^2 I), full covariances with eigenvalues in [0.1, 1], uneven weights."""
        of: dict[str, Any] = {"generator": seeded(seed), "dtype": torch.float64, "device": "cpu"}
        check_positive("components", components)
        means = 4 * torch.randn((components, d), **of)
        Q = torch.linalg.qr(torch.randn((components, d, d), **of))[0]
        eigenvalues = 0.1 + 0.9 * torch.rand((components, d), **of)
        weights = 0.5 + torch.rand(components, **of)
        return cls(weights.to(dtype), means.to(dtype), ((Q * eigenvalues[:, None, :]) @ Q.mT).to(dtype), steps=steps, **options)
