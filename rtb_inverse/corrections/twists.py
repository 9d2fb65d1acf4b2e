r"""Twists of sequential Monte Carlo: psi_t(x_t), an estimate of p(y | x_t)^beta = int p(x_0 | x_t) p(y | x_0)^beta dx_0 that costs no
network beyond the prior's estimate x0hat of x_0.

Where the operator is affine and the noise Gaussian, y = A x_0 + sigma n, and what is known of the error of x0hat is what the posterior's
guide knows (`guidance`): its covariance C, at the very state, on average, or r_t^2 I,

    psi_t = N(y; A x0hat, A C A^T + sigma^2 / beta).

For a white prior, e.g. the z of a generator, the Laplace approximation stands in for that (`laplace`), whatever the operator and the noise.
Where x_0 is not yet decided among far modes no Gaussian is right, and the posterior's `References` x_i say what the evidence is,

    psi_t = sum_i w_i p(y | x_i)^beta / sum_i w_i,    w_i = N(x_t; alpha_t x_i, sigma_t^2),

at the times at which their estimate of x_0 is the better one (a share w_t above 1/2, `references`).
Factors that are the same for all particles of an observation are left out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_choice
from rtb_inverse.distributions import GaussianStep
from rtb_inverse.guidance import AffineGuide, DenseGuidance, LocalGuidance, MaskGuidance
from rtb_inverse.laplace import LaplaceGuidance
from rtb_inverse.particles import check_below_infinity
from rtb_inverse.posterior import Posterior
from rtb_inverse.references import References

TWISTS = ("guide", "likelihood", "none")
Twist = Callable[[Tensor, Tensor, Tensor], Tensor]  # x_t (N, B, *shape), the estimate x0hat there, t; to log psi_t (N, B)


def own_step(prior: Prior, x_t: Tensor, t: Tensor, s: Tensor, base: GaussianStep) -> Distribution:
    """p(x_s | x_t), which is `base`, the Gaussian step around the prior's estimate, unless the prior has another transition. So one call
    of the network gives both."""
    return base if type(prior).transition is Prior.transition else prior.transition(x_t, t, s)


def make_twist(posterior: Posterior, y: Tensor | None, name: str | None) -> Twist | None:
    """log psi by name: "guide", "likelihood", or None for "none", 1. By default the guide's wherever it has one.

    Raises:
        ValueError: an unknown name; "guide" where the guide is none of an affine operator's and the posterior has no references.
    """
    references = None if y is None else posterior.references
    gaussian = y is not None and isinstance(posterior.guide, AffineGuide | MaskGuidance | DenseGuidance | LaplaceGuidance)
    guided = gaussian or references is not None
    name = check_choice("twist", ("guide" if guided else "likelihood") if name is None else name, TWISTS)
    if name == "none":
        return None
    if name == "guide" and not guided:
        raise ValueError("twist='guide' needs an affine operator with Gaussian noise, or a prior of exact draws; expected 'likelihood'")
    early = reference_twist(posterior, references, y) if name == "guide" and references is not None else None

    def log_psi(x_t: Tensor, estimate: Tensor, t: Tensor) -> Tensor:
        if early is not None and references.share[posterior.step_index(t)] > 0.5:
            return lifted(early(x_t, t))
        if name == "guide" and gaussian:
            return gaussian_log_evidence(posterior, x_t, estimate, t, y)
        return lifted(twist_log_likelihood(posterior, estimate, t, y))

    return log_psi


def lifted(log_psi: Tensor) -> Tensor:
    """A twist may not forbid a state whose end y may still allow: one of -inf becomes the least finite one of its observation, or 0."""
    check_below_infinity("log-likelihood at the estimates of x_0", log_psi)
    dead = log_psi.isneginf()
    least = log_psi.masked_fill(dead, torch.inf).amin(0).nan_to_num(posinf=0.0)
    return torch.where(dead, least, log_psi)


def twist_log_likelihood(posterior: Posterior, estimate: Tensor, t: Tensor, y: Tensor | None, spread: float = 1.0) -> Tensor:
    """How likely y is at an estimate of x_0 (N, B, *shape) with error r_t^2, (N, B). For Gaussian noise of variance sigma^2
    the log-likelihood is flattened by sigma^2 / (sigma^2 + spread r_t^2), for another noise, or a reward, by 1 - r_t^2 / r_T^2."""
    error = posterior.error(t).mean()
    variance = posterior.problem.noise_variance(y)
    if variance is not None:
        flatten = variance / (variance + posterior.beta * spread * error)
    else:
        flatten = (1 - error / posterior.error(posterior.times[0]).mean()).clamp_min(0)
    log_lik = posterior.log_likelihood(estimate, y)
    return torch.where(log_lik.isneginf(), log_lik, flatten.to(estimate.dtype) * log_lik)  # 0 times -inf is no number


def gaussian_log_evidence(posterior: Posterior, x_t: Tensor, estimate: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """log N(y; A x0hat, A C A^T + sigma^2 / beta), (N, B), with the covariance C that the posterior's guide has; whitened by sigma."""
    guide: Any = posterior.guide
    if isinstance(guide, LaplaceGuidance):
        return guide.log_evidence(estimate, y, guide.at(x_t, t))
    if isinstance(guide, MaskGuidance):
        noise_variance = guide.noise_variance[guide.mask] / posterior.beta
        residual = (y.flatten(1) - estimate[..., guide.mask]).double() * noise_variance.rsqrt()
        variance = posterior.error(t)[guide.mask] / noise_variance
    elif isinstance(guide, DenseGuidance):
        known = estimate.flatten(estimate.ndim - guide.event_dim).double() @ guide.basis.double() * guide.singular
        residual = posterior.beta**0.5 * ((y.reshape(len(y), -1) - guide.offset).double() @ guide.whiten.double().T - known)
        variance = posterior.beta * posterior.error(t).mean() * guide.singular**2
    else:
        whiten, A = guide.noise_variance.rsqrt(), guide.matrix
        if isinstance(guide, LocalGuidance):
            seen = (A.to(x_t.dtype) @ guide.covariance(x_t, t, A.to(x_t.dtype))).double()
        else:
            seen = A.double() @ guide.covariance(t) @ A.double().T
        variance, U = torch.linalg.eigh(whiten[:, None] * (seen + seen.mT) / 2 * whiten)
        variance = variance.clamp_min(0)
        residual = (U.mT @ (guide.residual(estimate, y).double() * whiten)[..., None])[..., 0]
    return -0.5 * (residual**2 / (1 + variance) + torch.log1p(variance)).sum(-1).to(x_t.dtype)


def reference_twist(posterior: Posterior, references: References, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """log psi of states x_t (N, B, *shape) at one time, (N, B)."""
    log_lik = posterior._likelihood_of(references, y).T  # (B, M)

    def log_evidence(x_t: Tensor, t: Tensor) -> Tensor:
        x, (alpha, sigma) = references.x.flatten(1), (c.to(x_t) for c in references.schedule.alpha_sigma(t))
        states, rows = x_t.reshape(-1, x.shape[1]), torch.arange(x_t.shape[:2].numel(), device=x_t.device) % len(y)
        parts = []
        for part, row in zip(states.split(references.chunk), rows.split(references.chunk), strict=True):
            log_w = alpha / sigma**2 * (part @ x.T - alpha / 2 * x.square().sum(1))
            parts.append((log_w + log_lik[row]).logsumexp(1) - log_w.logsumexp(1))
        return torch.cat(parts).reshape(x_t.shape[:2])

    return log_evidence
