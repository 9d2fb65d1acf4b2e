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

from torch import Tensor

from rtb_inverse.chains import Prior
from rtb_inverse.guidance.base import DENSE_LIMIT, Guide, Update, affine
from rtb_inverse.guidance.elements import ElementGuidance, LevelGuidance, MaskGuidance
from rtb_inverse.guidance.gradients import GradientGuidance, clipped, conjugate_gradients, jacobian
from rtb_inverse.guidance.matrices import AffineGuide, CovarianceGuidance, DenseGuidance, GaussianGuidance, LocalGuidance
from rtb_inverse.noise import GaussianNoise
from rtb_inverse.noise_range import NoiseRange
from rtb_inverse.problems import InverseProblem

__all__ = [
    "COVARIANCE_LIMIT",
    "DENSE_LIMIT",
    "GAUSSIAN_LIMIT",
    "LOCAL_LIMIT",
    "AffineGuide",
    "CovarianceGuidance",
    "DenseGuidance",
    "ElementGuidance",
    "GaussianGuidance",
    "GradientGuidance",
    "Guide",
    "LevelGuidance",
    "LocalGuidance",
    "MaskGuidance",
    "Update",
    "affine",
    "clipped",
    "conjugate_gradients",
    "covariance_guidance",
    "guidance",
    "jacobian",
]  # fmt: skip

COVARIANCE_LIMIT = 2**20  # elements of a gain that is kept for each of the K times
LOCAL_LIMIT = 2**12  # of a gain made for each state
GAUSSIAN_LIMIT = 2**24  # of a covariance of a Gaussian x, and of a matrix


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
    if isinstance(problem, NoiseRange) and problem.linear and not prior.decodes:
        guide = average_guidance(problem.operator, prior, beta)
        if guide is not None:
            return LevelGuidance(problem, guide, len(problem.shape))
    if prior.decodes or not isinstance(problem.noise, GaussianNoise) or not problem.linear:
        small = prior.shape.numel() ** 2 <= COVARIANCE_LIMIT
        if prior.exact_reversal or not small or prior.denoiser_covariance(prior.times[0]) is None:
            return None
        decode = prior.decode if prior.decodes else None
        return guidance(problem, decode, len(prior.shape), lambda t: beta * prior.denoiser_covariance(t))
    d, m = problem.shape.numel(), problem.y_shape.numel()
    if d * max(d, m) <= GAUSSIAN_LIMIT and prior.gaussian_covariance() is not None:
        return GaussianGuidance(problem, prior, beta)
    if prior.exact_reversal and d * m <= LOCAL_LIMIT:
        return LocalGuidance(problem, prior.local_covariance, beta)
    return average_guidance(problem, prior, beta)


def average_guidance(problem: InverseProblem, prior: Prior, beta: float) -> CovarianceGuidance | None:
    """Of a small affine operator, by the average covariance of the prior's error, where that is known; else None."""
    size = problem.shape.numel() * problem.y_shape.numel()
    if size > COVARIANCE_LIMIT or prior.denoiser_covariance(prior.times[0]) is None:
        return None
    unit = prior.denoiser_covariance(prior.times[-2]).diagonal().clamp_min(1e-30).sqrt()
    return CovarianceGuidance(problem, prior.denoiser_covariance, beta, unit)
