r"""FPS-SMC: filtering posterior sampling (Dou and Song 2024, "Diffusion posterior sampling for linear inverse problem solving: a
filtering perspective", ICLR).

For y = A x_0 + sigma n, the observation is noised along the forward process x_t = a x_s + b z, once for all particles:

    y_t = a y_s + b A z,    y_0 = y,    so that    p(y_t | x_t) = N(A x_t, alpha_t^2 sigma^2 I)

and a step's proposal is the exact Gaussian posterior of the prior's step N(m, D) and the observation at its end:

    q(x_s | x_t) = p(x_s | x_t, y_s) ~ p(x_s | x_t) p(y_s | x_s),    p(y_s | x_t) = N(A m, S),    S = A D A^T + alpha_s^2 sigma^2 I

with the weight log w += log p(y_s | x_t), and resampling.

This is the particle filter of a model in which y_T .. y_0 are observations of x_T .. x_0 with independent noises. But they share the one
noise n of y: the filter counts y more than once. With many particles it finds the posterior as sigma goes to 0, at a fixed number of
steps; at a fixed sigma it is too narrow along what y sees, the more so the more steps. Its mean weight estimates the p(y_T .. y_0) of that
model, not the evidence.

A prior whose own step is another distribution (a mixture's) gets its Gaussian step as N(m, D) and the ratio of the two into the weight.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from rtb_inverse.baselines.common import prepare
from rtb_inverse.chains import Chain, Prior
from rtb_inverse.checks import check_count, check_finite, check_fraction
from rtb_inverse.corrections import own_step, resample
from rtb_inverse.distributions import GaussianStep, draw
from rtb_inverse.guidance import DENSE_LIMIT, affine
from rtb_inverse.particles import Particles
from rtb_inverse.problems import GaussianNoise, InverseProblem
from rtb_inverse.randomness import standard_normal

LEAST_ALPHA = 1e-3  # of the level of noise of y_t: a y_T without any would be a singular observation


@torch.no_grad()
def fps_smc(
    prior: Prior, problem: InverseProblem, y: Tensor, n: int = 256, generator: Generator | None = None, *, threshold: float = 1.0,
    progress: bool = False,
) -> Particles:  # fmt: skip
    r"""FPS-SMC (Dou and Song 2024, algorithm 2), for affine operators and Gaussian noise.

    Args:
        prior: the prior's chain, in data space (no decoder).
        problem: the measurement model; bound to the prior's shape here.
        y: observations, (B, *y_shape).
        n: particles per observation, at least 2.
        threshold: resample where the effective sample size falls below threshold n; in [0, 1], 1 resamples at every step as the paper
            does, 0 never does.

    Returns:
        Particles(x (n, B, *data_shape), log_w (n, B)), whose `log_z` estimates log p(y_T .. y_0) of the filter's model, no evidence.

    Raises:
        TypeError, ValueError: arguments that are none or do not fit; an operator that is not affine, or too large for its matrix;
            another noise than Gaussian; a prior with a decoder; weights that are not finite.
    """
    y = prepare(prior, problem, y)
    check_count("n", n, 2), check_fraction("threshold", threshold)
    observer = Observer.of(prior, problem)
    ys = noised_observations(prior, observer, y, generator)

    base, law = Chain.initial(prior, (n, len(y))), prior.initial((n, len(y)))
    x, log_w = observer.propose(base, law, ys[0], prior.times[0], generator)
    log_z = x.new_zeros(len(y))
    steps = zip(pairwise(prior.times), ys[1:], strict=True)
    for (t, s), y_s in tqdm(steps, "particles", total=prior.steps, disable=not progress, leave=False):
        (x,), log_w, log_z = resample((x,), log_w, log_z, threshold, generator)
        base = prior.gaussian_step(x, prior.denoise(x, t), t, s)
        x, increment = observer.propose(base, own_step(prior, x, t, s, base), y_s, s, generator)
        log_w = check_finite("weights of the particles", log_w + increment)
    return Particles(x, log_w + log_z)


@dataclass
class Observer:
    """y_t = A x_t + alpha_t sigma n, in flat coordinates.

    Attributes:
        prior: for its schedule.
        matrix: A, (m, d).
        offset: of the affine operator, (m,).
        std: sigma, (m,).
    """

    prior: Prior
    matrix: Tensor
    offset: Tensor
    std: Tensor

    @staticmethod
    def of(prior: Prior, problem: InverseProblem) -> "Observer":
        if not isinstance(problem.noise, GaussianNoise):
            raise ValueError(f"problem must have Gaussian noise for fps_smc, got {type(problem.noise).__name__}")
        if not problem.linear:
            raise ValueError("problem must have an affine operator for fps_smc, got one that is not")
        if prior.decodes:
            raise ValueError("prior must live in data space for fps_smc, got one with a decoder, through which no operator is affine")
        if (size := problem.shape.numel() * problem.y_shape.numel()) > DENSE_LIMIT:
            raise ValueError(f"the operator's matrix must have at most {DENSE_LIMIT} elements for fps_smc, got {size}")
        matrix, offset = (c.to(**prior._options()) for c in affine(problem))
        return Observer(prior, matrix, offset, problem.noise.std.to(matrix).expand(problem.y_shape).flatten())

    def noise_std(self, t: Tensor) -> Tensor:
        """alpha_t sigma, (m,)."""
        alpha = self.prior.schedule.alpha_sigma(t)[0].clamp_min(LEAST_ALPHA)
        return alpha.to(self.std) * self.std

    def clean(self, x: Tensor) -> Tensor:
        """A x without the offset, (*batch, *shape) to (*batch, m)."""
        return x.flatten(x.ndim - len(self.prior.shape)) @ self.matrix.T

    def propose(self, base: Distribution, law: Distribution, y_s: Tensor, s: Tensor, generator=None) -> tuple[Tensor, Tensor]:
        """x_s ~ base(x_s) p(y_s | x_s) / Z, drawn as a draw of the pair (x, y) of base that is moved to the y_s which was observed;
        and its weight law(x_s) p(y_s | x_s) / (the density it was drawn from).

        Args:
            base: N(m, D) of batch (N, B), with one diagonal D for all. law: the prior's distribution of x_s.
            y_s: (B, m).

        Returns:
            x_s (N, B, *shape), log-weight (N, B), which is log p(y_s | x_t) where the law is the base.
        """
        noise = self.noise_std(s)
        matrix, variance = self.matrix.double(), base.variance[0, 0].flatten().double()
        root = torch.linalg.cholesky((matrix * variance) @ matrix.T + torch.diag(noise.double() ** 2))
        x = draw(base, generator)
        missing = (y_s - draw(GaussianStep(self.clean(x), noise, 1), generator)).double()
        x = x + ((missing @ torch.cholesky_inverse(root) @ matrix) * variance).reshape(x.shape).to(x.dtype)
        surprise = torch.linalg.solve_triangular(root.T, (y_s - self.clean(base.mean)).double(), upper=True, left=False)
        log_w = GaussianStep(surprise, torch.ones_like(variance[:1]), 1).log_prob(torch.zeros_like(surprise)) - root.diagonal().log().sum()
        log_w = log_w.to(x.dtype)
        return x, log_w if law is base else log_w + law.log_prob(x) - base.log_prob(x)


def noised_observations(prior: Prior, observer: Observer, y: Tensor, generator: Generator | None) -> list[Tensor]:
    """y_T .. y_0 without the operator's offset, each (B, m): y_t = a y_s + b A z up the prior's grid."""
    ys = [y.reshape(len(y), -1) - observer.offset]
    for s, t in pairwise(prior.times.flip(0)):
        a, b = (c.to(y.dtype) for c in prior.schedule.forward_step(s, t))
        z = standard_normal(y, generator, (len(y), observer.matrix.shape[1]))
        ys.append(a * ys[-1] + b * z @ observer.matrix.T)
    return ys[::-1]
