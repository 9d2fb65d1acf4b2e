"""The Gaussian of one reverse step, and drawing with an explicit generator."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, constraints

from rtb_inverse.randomness import generator_on, standard_normal
from rtb_inverse.schedules import expand


def draw(distribution: Distribution, generator: Generator | None = None) -> Tensor:
    """One draw, of shape batch_shape + event_shape. Ours take the generator; torch's own know only the global state, which is
    seeded from the generator for this draw and restored."""
    if isinstance(distribution, SeededDistribution):
        return distribution.sample(generator=generator)
    if generator is None:
        return distribution.sample()
    with global_state_from(generator):
        return distribution.sample()


@contextmanager
def global_state_from(generator: Generator) -> Iterator[None]:
    """For what knows the global random state only (torch's distributions, dropout): seeded from the generator, and restored afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator_on(torch.device("cpu"), generator), device="cpu"))
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def along(v: Tensor, basis: Tensor) -> Tensor:
    """V^T v for v (*batch, d) and a basis V (d, m), or one for each of the batch's last axes: (*batch, m)."""
    return v @ basis if basis.ndim == 2 else torch.einsum("...d,...dm->...m", v, basis)


class SeededDistribution(Distribution):
    """A torch distribution whose `sample` takes a `torch.Generator`."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def rsample(self, sample_shape=torch.Size(), generator: Generator | None = None) -> Tensor:
        raise NotImplementedError

    def sample(self, sample_shape=torch.Size(), generator: Generator | None = None) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape, generator)

    @property
    def stddev(self) -> Tensor:
        return self.variance.sqrt()


class GaussianStep(SeededDistribution):
    """N(loc, C) over the last `event_dim` axes of loc.

    C is diagonal, C = diag(scale^2), or, where an orthonormal basis V of shape (d, m) is given, C = E M E with E = diag(scale),
    M = I + V (diag(ratio^2) - I) V^T: along column i of V the standard deviation is ratio_i times that across V.

    Args:
        loc: mean, (*batch, *shape).
        scale: standard deviations > 0, broadcastable to loc.
        event_dim: number of event axes.
        basis: (d, m) or (*batch or ones, d, m), with orthonormal columns, d = number of elements of an event.
        ratio: (*batch or ones, m), > 0.
    """

    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor, event_dim: int, basis: Tensor | None = None, ratio: Tensor | None = None):
        self.loc, self.scale, self.basis, self.ratio = loc, scale, basis, ratio
        head = loc.ndim - event_dim
        super().__init__(loc.shape[:head], loc.shape[head:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        variance = (self.scale**2).expand(self.loc.shape)
        if self.basis is None:
            return variance
        share = torch.einsum("...m,...dm->...d", self.ratio**2 - 1, self.basis**2)
        return variance * (1 + share).reshape(share.shape[:-1] + self.event_shape)

    def _along_basis(self, z: Tensor, factor: Tensor) -> Tensor:
        """(I + V diag(factor) V^T) z."""
        flat = z.flatten(z.ndim - len(self.event_shape))
        return (flat + along(along(flat, self.basis) * factor, self.basis.mT)).reshape(z.shape)

    def times_covariance(self, v: Tensor) -> Tensor:
        """C v for each v of (*batch, *shape)."""
        if self.basis is None:
            return self.scale**2 * v
        return self.scale * self._along_basis(self.scale * v, self.ratio**2 - 1)

    def rsample(self, sample_shape=torch.Size(), generator=None):
        noise = standard_normal(self.loc, generator, torch.Size(sample_shape) + self.loc.shape)
        if self.basis is not None:
            noise = self._along_basis(noise, self.ratio - 1)
        return self.loc + self.scale * noise

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, (*batch)."""
        z = (x - self.loc) / self.scale
        log_density = -0.5 * z**2 - self.scale.log() - 0.5 * math.log(2 * math.pi)
        log_density = log_density.flatten(log_density.ndim - len(self.event_shape)).sum(-1)
        if self.basis is None:
            return log_density
        u = along(z.flatten(z.ndim - len(self.event_shape)), self.basis)
        return log_density - (0.5 * u**2 * (self.ratio**-2 - 1) + self.ratio.log()).sum(-1)

    def expected_log_prob(self, mean: Tensor, sd: Tensor) -> Tensor:
        """E log N(x; loc, C) over x ~ N(mean, sd^2 I), mean of shape (*batch, *shape), sd of shape (*batch): the log density at the
        mean less half of sd^2 trace C^-1."""
        precision = (self.scale**-2).expand(self.loc.shape).flatten(self.loc.ndim - len(self.event_shape))
        trace = precision.sum(-1)
        if self.basis is not None:
            trace = trace + ((self.ratio**-2 - 1) * along(precision, self.basis**2)).sum(-1)
        return self.log_prob(mean) - 0.5 * expand(sd, trace) ** 2 * trace
