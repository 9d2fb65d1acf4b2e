r"""Noise models p(y | A(x)), normalised in y, with their first two moments. Written for one element, a = A(x):

    Gaussian               y = a + std n,                                    n ~ N(0, 1)
    correlated Gaussian    y = a + n,                                        n ~ N(0, C) over all elements
    complex Gaussian       y = a + std (n_1 + i n_2) / sqrt(2),              real and imaginary part along a last axis of 2
    Laplace                p(y) = exp(-|y - a| / scale) / (2 scale)
    Student-t              y = a + scale n,                                  n ~ t(df)
    log-normal             y = a exp(std n)
    Poisson                y ~ Poisson(lambda),                              lambda = gain a + background
    Poisson-Gaussian       y = k + std n,                                    k ~ Poisson(lambda)
    negative binomial      y ~ Poisson(g),                                   g ~ Gamma of mean lambda and variance lambda^2 / total_count
    Bernoulli              y ~ Bernoulli(1 / (1 + exp(-a)))
    quantised              y = #{j : a + std n > edges_j}

A model is a distribution given a: what draws y also scores it. `mean` and `variance`, E[y | a] and Var[y | a], are what the guides
know of it (`guidance`). A y that the model cannot give has log-density -inf; `check` says so in words.
"""

import math
from numbers import Real
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.distributions import (
    Bernoulli,
    Distribution,
    Laplace,
    LogNormal,
    MultivariateNormal,
    NegativeBinomial,
    Normal,
    Poisson,
    StudentT,
)

from rtb_inverse.distributions import draw
from rtb_inverse.noise_distributions import PoissonPlusNormal, QuantisedNormal, above_zero
from rtb_inverse.randomness import generator_on, standard_normal

REACH = 8  # standard deviations; a Gaussian has 1e-15 of its mass beyond


def parameter(name: str, value: float | Tensor, least: float = 0.0, allow_least: bool = False) -> Tensor:
    """A number (as float64) or a real tensor, finite and above `least`; one clear error otherwise."""
    if not isinstance(value, Real | Tensor) or (isinstance(value, Tensor) and value.is_complex()):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")
    tensor = torch.as_tensor(value, dtype=value.dtype if isinstance(value, Tensor) and value.is_floating_point() else torch.float64)
    if not (((tensor >= least) if allow_least else (tensor > least)) & torch.isfinite(tensor)).all():
        raise ValueError(f"{name} must be finite and {'at least' if allow_least else 'above'} {least:g}, got {tensor.tolist()!r}")
    return tensor


def is_count(y: Tensor) -> Tensor:
    """Whether y is 0, 1, 2, ..., element by element."""
    return (y >= 0) & (y == y.round())


class Noise(nn.Module):
    """p(y | a) for a = A(x), element by element. Subclasses give `given`, and `supports` where not every real y can be seen.

    Parameters are buffers by the names of the constructor's arguments: with the class's name they rebuild the model (`noise_from_config`).

    Attributes:
        support: what y has to be, in words.
        domain: what `clean` has to be, in words.
        shared: parameters that are not one number per element of y.
        whole: whether y holds whole numbers.
    """

    support: ClassVar[str] = "finite"
    domain: ClassVar[str] = "finite"
    shared: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[bool] = False

    def given(self, clean: Tensor) -> Distribution:
        """p(y | a) of each element of `clean`; it has to be finite outside of the domain too."""
        raise NotImplementedError

    def supports(self, y: Tensor) -> Tensor:
        """Whether the model can give such a y at all, element by element (boolean)."""
        return torch.isfinite(y)

    def allows(self, clean: Tensor) -> Tensor:
        """Whether `clean` is in the model's domain, element by element (boolean)."""
        return torch.isfinite(clean)

    def possible(self, clean: Tensor, y: Tensor) -> Tensor:
        """Whether y can be seen given `clean`, element by element (boolean)."""
        return self.supports(y) & self.allows(clean)

    def sample(self, clean: Tensor, generator: Generator | None = None) -> Tensor:
        """y given A(x), of the shape of `clean`.

        Raises:
            ValueError: `clean` outside of the model's domain.
        """
        if not self.allows(clean).all():
            worst = clean[~self.allows(clean)].min()
            raise ValueError(f"operator's output must be {self.domain} for {type(self).__name__}, got {float(worst):.6g}")
        return self._draw(clean, generator)

    def _draw(self, clean: Tensor, generator: Generator | None) -> Tensor:
        return draw(self.given(clean), generator)

    def log_prob(self, clean: Tensor, y: Tensor, event_dim: int) -> Tensor:
        """log p(y | A(x)), summed over the last `event_dim` axes; clean and y broadcast. -inf where y or A(x) is none of the model's.
        In float64 inside: for counts and far bins these are small differences of large numbers."""
        wide, y = clean.double(), y.double()
        log_density = torch.where(self.possible(wide, y), self.given(wide).log_prob(y), -torch.inf)
        return total(log_density, event_dim).to(clean.dtype)

    def mean(self, clean: Tensor) -> Tensor:
        """E[y | A(x)], of the shape of `clean`."""
        return self.given(clean).mean

    def variance(self, clean: Tensor) -> Tensor:
        """Var[y | A(x)], element by element, of the shape of `clean`; finite."""
        return self.given(clean).variance

    def whiten(self, clean: Tensor, residual: Tensor) -> Tensor:
        """C^{-1/2} residual, for C = Cov[y | A(x)]: a residual y - mean(clean) gets covariance 1. Linear in the residual."""
        return residual / self.variance(clean).clamp_min(1e-12).sqrt()

    def check_shape(self, y_shape: torch.Size) -> None:
        """ValueError where a parameter is not one number, or one per element of a y of shape `y_shape`."""
        for name, value in self.named_buffers():
            sizes = zip(reversed(value.shape), reversed(y_shape), strict=False)
            if name not in self.shared and (value.ndim > len(y_shape) or any(size not in (1, of) for size, of in sizes)):
                title = "noise_std" if name == "std" else name
                raise ValueError(
                    f"{title} of {type(self).__name__} must be a number or broadcast to y, {tuple(y_shape)}, got shape {tuple(value.shape)}"
                )

    def check(self, y: Tensor) -> Tensor:
        """y, if the model can give it; ValueError otherwise."""
        bad = y[~self.supports(y)]
        if bad.numel():
            raise ValueError(f"y must be {self.support} for {type(self).__name__}, got {float(bad[0]):.6g} ({bad.numel()} such elements)")
        return y

    @property
    def config(self) -> dict | None:
        """What `noise_from_config` needs beside the buffers (JSON); None for a class that is not in `NOISES`."""
        name = type(self).__name__
        return {"class": name} if NOISES.get(name) is type(self) else None


def total(log_density: Tensor, event_dim: int) -> Tensor:
    """The sum over the last `event_dim` axes."""
    return log_density.reshape(*log_density.shape[: log_density.ndim - event_dim], -1).sum(-1)


class GaussianNoise(Noise):
    """y = A(x) + std n, n ~ N(0, I).

    Args:
        std: > 0, a number, or a tensor that broadcasts to y (one level per element).
    """

    std: Tensor

    def __init__(self, std: float | Tensor):
        super().__init__()
        self.register_buffer("std", parameter("noise_std", std))

    def given(self, clean):
        return Normal(clean, self.std.to(clean.dtype).expand(clean.shape), validate_args=False)

    def sample(self, clean: Tensor, generator: Generator | None = None) -> Tensor:
        noise = standard_normal(clean, generator)
        return clean + self.std.to(clean.dtype) * noise

    def log_prob(self, clean: Tensor, y: Tensor, event_dim: int) -> Tensor:
        std = self.std.to(clean.dtype)  # not spread over all draws, as torch's Normal does
        return total(-0.5 * ((y - clean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi), event_dim)

    def whiten(self, clean: Tensor, residual: Tensor) -> Tensor:
        return residual / self.std.to(residual.dtype)


class ComplexGaussianNoise(GaussianNoise):
    """y = A(x) + std n, n circular: its real and its imaginary part are N(0, 1/2), so E|n|^2 = 1.

    Measurements are real views of complex ones, `torch.view_as_real`: real and imaginary part along a last axis of 2. So this is real
    Gaussian noise of std / sqrt(2), and all that is made for that (guides, baselines) holds for it.

    Args:
        std: > 0, a number, or a tensor that broadcasts to the complex y, without the last axis of 2.
    """

    def __init__(self, std: float | Tensor):
        super().__init__(parameter("noise_std", std)[..., None] / 2**0.5)

    def sample(self, clean, generator=None):
        if clean.shape[-1:] != (2,):
            raise ValueError(
                f"operator's output must have a last axis of 2 (torch.view_as_real) for ComplexGaussianNoise, got {tuple(clean.shape)}"
            )
        return super().sample(clean, generator)

    @property
    def config(self):
        return {"class": "GaussianNoise"}  # as which its buffers rebuild it


class CorrelatedGaussianNoise(Noise):
    """y = A(x) + n, n ~ N(0, C) over all elements of one y.

    Args:
        covariance: C, symmetric and positive definite, of shape (*y_shape, *y_shape): (m, m) for vectors.
    """

    covariance: Tensor
    scale_tril: Tensor

    def __init__(self, covariance: Tensor):
        super().__init__()
        if not isinstance(covariance, Tensor) or not covariance.is_floating_point():
            was = f"{covariance.dtype} of shape {tuple(covariance.shape)}" if isinstance(covariance, Tensor) else repr(covariance)
            raise TypeError(f"covariance must be a floating-point tensor, got {was}")
        self.event_dim = covariance.ndim // 2
        self.event_shape = covariance.shape[: self.event_dim]
        if covariance.shape != (*self.event_shape, *self.event_shape) or not covariance.ndim:
            raise ValueError(f"covariance must have shape (*y_shape, *y_shape), got {tuple(covariance.shape)}")
        matrix = covariance.reshape(self.event_shape.numel(), -1)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not torch.isfinite(matrix).all() or not torch.allclose(matrix, matrix.T) or failed:
            least = torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0] if torch.isfinite(matrix).all() else math.nan
            raise ValueError(
                f"covariance must be finite, symmetric and positive definite, got one of smallest eigenvalue {float(least):.3g}"
                f" and asymmetry {float((matrix - matrix.T).abs().max()):.3g}"
            )
        self.register_buffer("covariance", covariance)
        self.register_buffer("scale_tril", factor, persistent=False)

    def check_shape(self, y_shape):
        if tuple(y_shape) != tuple(self.event_shape):
            raise ValueError(f"covariance must be of y, {tuple(y_shape)} twice, got shape {tuple(self.covariance.shape)}")

    def _flat(self, y: Tensor) -> Tensor:
        """(*batch, *y_shape) to (*batch, m)."""
        if y.shape[y.ndim - self.event_dim :] != self.event_shape:
            raise ValueError(
                f"operator's output must end in the covariance's shape {tuple(self.event_shape)} for {type(self).__name__}, "
                f"got {tuple(y.shape)}"
            )
        return y.flatten(y.ndim - self.event_dim)

    def sample(self, clean, generator=None):
        flat = self._flat(clean)
        noise = standard_normal(clean, generator, flat.shape)
        return clean + (noise @ self.scale_tril.to(clean.dtype).T).reshape(clean.shape)

    def log_prob(self, clean, y, event_dim):
        residual, factor = self._flat(y - clean), self.scale_tril.to(clean.dtype)
        return MultivariateNormal(torch.zeros_like(factor[0]), scale_tril=factor, validate_args=False).log_prob(residual)

    def mean(self, clean):
        return clean

    def variance(self, clean):
        return self.covariance.reshape(self.scale_tril.shape).diagonal().reshape(self.event_shape).to(clean.dtype).expand(clean.shape)

    def whiten(self, clean, residual):
        flat = self._flat(residual)
        white = torch.linalg.solve_triangular(self.scale_tril.to(residual.dtype), flat.reshape(-1, flat.shape[-1]).T, upper=False)
        return white.T.reshape(residual.shape)


class LaplaceNoise(Noise):
    """y = A(x) + scale n, n of density exp(-|n|) / 2; its standard deviation is sqrt(2) scale.

    Args:
        scale: > 0, a number, or a tensor that broadcasts to y.
    """

    scale: Tensor

    def __init__(self, scale: float | Tensor):
        super().__init__()
        self.register_buffer("scale", parameter("scale", scale))

    def given(self, clean):
        return Laplace(clean, self.scale.to(clean.dtype), validate_args=False)


class StudentTNoise(Noise):
    """y = A(x) + scale n, n ~ t(df): outliers.

    Args:
        df: degrees of freedom, > 0, a number, or a tensor that broadcasts to y; 1 is the Cauchy distribution.
        scale: > 0, likewise.
    """

    df: Tensor
    scale: Tensor

    def __init__(self, df: float | Tensor, scale: float | Tensor):
        super().__init__()
        self.register_buffer("df", parameter("df", df))
        self.register_buffer("scale", parameter("scale", scale))

    def given(self, clean):
        return StudentT(self.df.to(clean.dtype), clean, self.scale.to(clean.dtype), validate_args=False)

    def mean(self, clean):
        """The centre A(x), for every df; for df <= 1 there is no mean."""
        return clean

    def variance(self, clean):
        """scale^2 df / (df - 2). For df <= 2, where that is infinite, the inverse Fisher information scale^2 (df + 3) / (df + 1) stands
        in: the variance of the Gaussian noise that would say as much about A(x)."""
        df, scale = self.df.to(clean.dtype), self.scale.to(clean.dtype)
        factor = torch.where(df > 2, df / (df - 2).where(df > 2, 1.0), (df + 3) / (df + 1))
        return (scale**2 * factor).expand(clean.shape)


class LogNormalNoise(Noise):
    """y = A(x) exp(std n), n ~ N(0, 1): multiplicative, A(x) > 0 its median.

    Args:
        std: of log y, > 0, a number, or a tensor that broadcasts to y.
    """

    support = domain = "above 0"
    std: Tensor

    def __init__(self, std: float | Tensor):
        super().__init__()
        self.register_buffer("std", parameter("noise_std", std))

    def given(self, clean):
        return LogNormal(above_zero(clean).log(), self.std.to(clean.dtype), validate_args=False)

    def supports(self, y):
        return y > 0

    def allows(self, clean):
        return clean > 0


class RateNoise(Noise):
    """Of a rate lambda = gain A(x) + background >= 0.

    Args:
        gain: > 0, a number, or a tensor that broadcasts to y: counts per unit of A(x). Where A(x) is in [0, 1] it is the peak.
        background: >= 0, likewise: the mean count where A(x) = 0 (dark counts).
    """

    domain = "at least -background / gain"
    gain: Tensor
    background: Tensor

    def __init__(self, gain: float | Tensor = 1.0, background: float | Tensor = 0.0):
        super().__init__()
        self.register_buffer("gain", parameter("gain", gain))
        self.register_buffer("background", parameter("background", background, allow_least=True))

    def rate(self, clean: Tensor) -> Tensor:
        """lambda; where that is below 0, 0."""
        return self._affine(clean).clamp_min(0)

    def _affine(self, clean: Tensor) -> Tensor:
        return self.gain.to(clean.dtype) * clean + self.background.to(clean.dtype)

    def allows(self, clean):
        return self._affine(clean) >= 0


class PoissonNoise(RateNoise):
    """y ~ Poisson(lambda), lambda = gain A(x) + background: counts.

    Args:
        gain: > 0, a number, or a tensor that broadcasts to y: counts per unit of A(x). Where A(x) is in [0, 1] it is the peak.
        background: >= 0, likewise: the mean count where A(x) = 0 (dark counts). A(x) is to be at least -background / gain.
    """

    support, whole = "counts, 0, 1, 2, ...,", True

    def given(self, clean) -> Distribution:
        return Poisson(above_zero(self.rate(clean)), validate_args=False)

    def supports(self, y):
        return is_count(y)

    def possible(self, clean, y):
        return super().possible(clean, y) & ((self.rate(clean) > 0) | (y == 0))

    def log_prob(self, clean, y, event_dim):
        """As of `Noise`; of A(x) (*batch, 1, *event) and y (B, *event), sum y log lambda - lambda - log y! by one matrix product."""
        many = event_dim and clean.ndim > event_dim + 1 and clean.shape[-1 - event_dim] == 1 and y.ndim == event_dim + 1
        if not many or not self.allows(clean).all():
            return super().log_prob(clean, y, event_dim)
        rate, flat = self.rate(clean.double()).expand(*clean.shape[:-event_dim], *y.shape[1:]).flatten(-event_dim), y.double().flatten(1)
        allowed = self.supports(flat).all(1) & ~((rate == 0).double() @ (flat > 0).double().T).bool()
        log_p = above_zero(rate).log() @ flat.T - rate.sum(-1, keepdim=True) - torch.lgamma(flat + 1).sum(1)
        return log_p.where(allowed, -torch.inf)[..., 0, :].to(clean.dtype)

    def _draw(self, clean, generator):
        return torch.poisson(self.rate(clean), generator=generator_on(clean.device, generator))


class NegativeBinomialNoise(PoissonNoise):
    """Counts whose rate varies: of mean lambda = gain A(x) + background and variance lambda + lambda^2 / total_count.

    Args:
        total_count: r > 0, a number, or a tensor that broadcasts to y; as it grows, y becomes Poisson. To scipy it is
            nbinom(r, r / (r + lambda)).
        gain, background: as of `PoissonNoise`.
    """

    total_count: Tensor
    log_prob = Noise.log_prob  # no matrix product

    def __init__(self, total_count: float | Tensor, gain: float | Tensor = 1.0, background: float | Tensor = 0.0):
        super().__init__(gain, background)
        self.register_buffer("total_count", parameter("total_count", total_count))

    def given(self, clean):
        total_count = self.total_count.to(clean.dtype)
        return NegativeBinomial(total_count, logits=above_zero(self.rate(clean)).log() - total_count.log(), validate_args=False)

    def _draw(self, clean, generator):
        return draw(self.given(clean), generator)


class PoissonGaussianNoise(RateNoise):
    """y = k + std n, k ~ Poisson(lambda), lambda = gain A(x) + background, n ~ N(0, 1): counts read out with noise, in units of counts.

    p(y) = sum_k Poisson(k; lambda) N(y; k, std^2). The summands are log-concave in k, with a curvature of at least 1 / std^2, so those
    farther than 8 std from the largest are less than 1e-14 of the sum: they are left out. Time grows with std, memory does not.

    Args:
        std: of the read-out, in counts, > 0, a number, or a tensor that broadcasts to y.
        gain, background: as of `PoissonNoise`.
    """

    std: Tensor

    def __init__(self, std: float | Tensor, gain: float | Tensor = 1.0, background: float | Tensor = 0.0):
        super().__init__(gain, background)
        self.register_buffer("std", parameter("noise_std", std))
        self.reach = math.ceil(REACH * float(self.std.max())) + 1

    def given(self, clean):
        return PoissonPlusNormal(self.rate(clean), self.std.to(clean.dtype), self.reach)


class BernoulliNoise(Noise):
    """y is 1 with probability 1 / (1 + exp(-A(x))), else 0: A(x) is a logit. (`torch.logit` makes one of a probability.)"""

    support, whole = "0 or 1", True

    def given(self, clean):
        return Bernoulli(logits=clean, validate_args=False)

    def supports(self, y):
        return (y == 0) | (y == 1)

    def _draw(self, clean, generator):
        return torch.bernoulli(clean.sigmoid(), generator=generator_on(clean.device, generator))


class QuantisedNoise(Noise):
    """y = the number of edges below A(x) + std n, n ~ N(0, 1): which of L + 1 bins a converter saw, 0 to L. The first and the last bin
    have no end: what lies beyond is clipped to them. A probability of bins, so normalised over y.

    Args:
        std: of the noise before quantisation, > 0, a number, or a tensor that broadcasts to y.
        edges: between bins, (L,), increasing, L >= 1; `torch.linspace(low, high, L)` for bins of one width.

    `mean` and `variance` are those of y, so in bins; where std is far below a bin's width, the mean is a staircase and guides little.
    """

    support, whole = "the number of a bin, 0, 1, ... to the number of edges,", True
    shared = ("edges",)
    std: Tensor
    edges: Tensor

    def __init__(self, std: float | Tensor, edges: Tensor):
        super().__init__()
        self.register_buffer("std", parameter("noise_std", std))
        if not isinstance(edges, Tensor) or not edges.is_floating_point():
            raise TypeError(f"edges must be a floating-point tensor, got {edges!r}")
        if edges.ndim != 1 or not len(edges) or not torch.isfinite(edges).all() or not (edges.diff() > 0).all():
            raise ValueError(f"edges must be finite and increasing, of shape (L,) with L >= 1, got {edges.tolist()!r}")
        self.register_buffer("edges", edges)

    def given(self, clean):
        return QuantisedNormal(clean, self.std.to(clean.dtype), self.edges.to(clean.dtype))

    def supports(self, y):
        return is_count(y) & (y <= len(self.edges))


NOISES: dict[str, type[Noise]] = {
    noise.__name__: noise
    for noise in (
        GaussianNoise, CorrelatedGaussianNoise, ComplexGaussianNoise, LaplaceNoise, StudentTNoise, LogNormalNoise, PoissonNoise,
        PoissonGaussianNoise, NegativeBinomialNoise, BernoulliNoise, QuantisedNoise,
    )
}  # fmt: skip


def noise_from_config(config: dict, weights: dict[str, Tensor]) -> Noise:
    """Rebuild a noise model from its `config` and its buffers.

    Raises:
        ValueError: a class that is none of `NOISES`.
    """
    if config["class"] not in NOISES:
        raise ValueError(f"config names the noise model {config['class']!r}, expected one of {', '.join(NOISES)}")
    return NOISES[config["class"]](**weights)
