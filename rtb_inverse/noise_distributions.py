r"""Distributions of measurements that torch has not: counts read out with Gaussian noise, and the bins of a quantiser."""

import math

import torch
from torch import Tensor
from torch.special import log_ndtr, ndtr

from rtb_inverse.distributions import SeededDistribution
from rtb_inverse.randomness import generator_on, standard_normal

FAR = 40.0  # standard deviations; a Gaussian has 1e-350 of its mass beyond


def above_zero(rate: Tensor) -> Tensor:
    """A rate of 0 as the smallest number above it, so that its logarithm is finite and what follows has a derivative."""
    return rate.clamp_min(torch.finfo(rate.dtype).tiny)


class PoissonPlusNormal(SeededDistribution):
    """k + std n, k ~ Poisson(rate), n ~ N(0, 1); sums over the `reach` counts at either side of the likeliest k."""

    def __init__(self, rate: Tensor, std: Tensor, reach: int):
        self.rate, self.std, self.reach = rate, std, reach
        super().__init__(rate.shape, validate_args=False)

    @property
    def mean(self):
        return self.rate

    @property
    def variance(self):
        return self.rate + self.std**2

    def sample(self, sample_shape=torch.Size(), generator=None):
        rate = self.rate.expand(torch.Size(sample_shape) + self.rate.shape)
        noise = standard_normal(rate, generator)
        return torch.poisson(rate, generator=generator_on(rate.device, generator)) + self.std * noise

    def log_prob(self, y):
        rate = above_zero(self.rate)
        centre = self._likeliest(rate.detach(), y)

        def log_summand(k):
            log_normal = -0.5 * ((y - k) / self.std) ** 2 - self.std.log() - 0.5 * math.log(2 * math.pi)
            return k * rate.log() - rate - torch.lgamma(k + 1) + log_normal

        largest, counts = log_summand(centre), 0.0
        for offset in range(-self.reach, self.reach + 1):
            k = centre + offset
            counts = counts + torch.where(k >= 0, (log_summand(k.clamp_min(0)) - largest).exp(), 0.0)
        return largest + counts.log()

    @torch.no_grad()
    def _likeliest(self, rate: Tensor, y: Tensor) -> Tensor:
        """The count k of the largest summand, to within one: where log(rate / v) = (k - y) / std^2 for v = k + 1/2 (log v is the
        derivative of log k!). In u = log v that is e^u + std^2 u = c: convex and increasing, so Newton's steps from above converge."""
        c = y + 0.5 + self.std**2 * rate.log()
        u = c.clamp_min(1).log()
        for _ in range(10):
            u = u - (u.exp() + self.std**2 * u - c) / (u.exp() + self.std**2)
        return (u.exp() - 0.5).round().clamp_min(0)


class QuantisedNormal(SeededDistribution):
    """The number of edges below loc + std n, n ~ N(0, 1). With Phi the normal distribution function,

    p(y) = Phi(b) - Phi(a),      a, b = (edges_{y-1} - loc) / std, (edges_y - loc) / std.
    """

    def __init__(self, loc: Tensor, std: Tensor, edges: Tensor):
        self.loc, self.std, self.edges = loc, std, edges
        super().__init__(loc.shape, validate_args=False)

    def _above(self) -> Tensor:
        """P(y > j), (..., L), in float64: the variance is a small difference of its sums."""
        return ndtr((self.loc[..., None] - self.edges).double() / self.std[..., None])

    @property
    def mean(self):
        return self._above().sum(-1).to(self.loc.dtype)

    @property
    def variance(self):
        above, odd = self._above(), 2 * torch.arange(len(self.edges), device=self.loc.device) + 1
        return ((odd * above).sum(-1) - above.sum(-1) ** 2).clamp_min(0).to(self.loc.dtype)

    def sample(self, sample_shape=torch.Size(), generator=None):
        loc = self.loc.expand(torch.Size(sample_shape) + self.loc.shape)
        noise = standard_normal(loc, generator)
        return torch.bucketize(loc + self.std * noise, self.edges).to(loc.dtype)

    def log_prob(self, y):
        bin = y.nan_to_num().long().clamp(0, len(self.edges))  # any bin, for a y that is none: `Noise.log_prob` gives that -inf
        infinity = self.edges.new_full((1,), torch.inf)
        ends = torch.cat([-infinity, self.edges, infinity])
        return log_interval((ends[bin] - self.loc) / self.std, (ends[bin + 1] - self.loc) / self.std)


def log_interval(a: Tensor, b: Tensor) -> Tensor:
    """log(Phi(b) - Phi(a)) for a < b, one of them finite, Phi the normal distribution function; accurate in both tails."""
    mirrored = a + b > 0  # Phi(b) - Phi(a) = Phi(-a) - Phi(-b), without 1 - 1
    a, b = torch.where(mirrored, -b, a), torch.where(mirrored, -a, b)
    a = a.maximum(-b.abs() - FAR)  # beyond, its share is 0 and its derivatives overflow
    log_b = log_ndtr(b)
    ratio = (log_ndtr(a) - log_b).clamp_max(-torch.finfo(a.dtype).tiny)  # of the two, for an interval too narrow to tell
    return log_b + (-torch.expm1(ratio)).log()
