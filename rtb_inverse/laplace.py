r"""A guide for white x_0 ~ N(0, I) (the noise z of a generator x = f(z), where the prior's chain is exact) and any smooth likelihood.

Around the mode x* of x_0 given y, with r = whitened misfit and J = dr/dx_0 there, the posterior is nearly N(x*, (I + J^T J)^{-1}): the
Laplace approximation, by Gauss and Newton. With J^T J = V diag(h) V^T the steps are those of the exact chain of that Gaussian: an estimate
e of x_0 with the error r_t^2 I moves by and keeps of its variance

    V diag(r_t^2 / (1 + r_t^2 h)) V^T (J^T J (x* - e) - J^T r(x*)),      1 / (1 + r_t^2 h) along the columns of V.

It is exact where the whitened misfit is affine. Where y allows several modes it knows the best one found: what is left is for the
references (`References`), the training and the corrections.
"""

import math

import torch
from torch import Tensor

from rtb_inverse.chains import Prior
from rtb_inverse.distributions import GaussianStep, along
from rtb_inverse.guidance import Guide, Update
from rtb_inverse.problems import InverseProblem
from rtb_inverse.randomness import fixed_normal

LIMIT = 2**14  # elements of J
STARTS = 512  # draws of the prior, the best of which is where the search for the mode begins
ROUNDS = 12  # of Gauss and Newton
AT_ONCE = 2**22  # elements of y in all products with J that are made at once


class LaplaceGuidance(Guide):
    """
    Args:
        problem: differentiable, with a `residual`; bound to the prior's data shape.
        prior: white.
        beta: inverse temperature of the likelihood.
    """

    per_observation = True
    starts: Tensor

    def __init__(self, problem: InverseProblem, prior: Prior, beta: float = 1.0):
        super().__init__()
        self.problem, self.beta, self.event_dim = problem, beta, len(prior.shape)
        self._decode, self.schedule = prior.decode, prior.schedule
        x = fixed_normal(2, (STARTS, *prior.shape), prior._options()["dtype"]).to(prior._options()["device"])  # the same on every device
        self.register_buffer("starts", torch.cat([torch.zeros_like(x[:1]), x]), persistent=False)
        self._last: tuple[Tensor, tuple[Tensor, Tensor, Tensor]] | None = None

    def at(self, x_t, t):
        """r_t^2 = Var[x_0 | x_t] of a white x_0, of t's shape."""
        alpha, sigma = self.schedule.alpha_sigma(t.to(self.starts.device))
        return sigma**2 / (alpha**2 + sigma**2)

    def misfit(self, z: Tensor, y: Tensor) -> Tensor:
        """sqrt(beta) (E[y | z] - y), whitened by the noise's variance at z, which is held fixed: (M, d) and (M, *y_shape) to (M, m)."""
        return -math.sqrt(self.beta) * self.problem.residual(self._decode(z.reshape(len(z), *self.starts.shape[1:])), y).reshape(len(z), -1)

    def log_posterior(self, z: Tensor, y: Tensor) -> Tensor:
        """log p(z) + beta log p(y | z) but for a constant: z (N, B, d) or (N, 1, d), y (B, *y_shape) to (N, B)."""
        x = self._decode(z.reshape(*z.shape[:2], *self.starts.shape[1:]))
        return self.beta * self.problem.log_likelihood(x, y) - 0.5 * z.square().sum(-1)

    def linearise(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The misfit r (B, m) and J (B, m, d) at z (B, d), a few observations at a time."""
        found = []
        for part, of in zip(*(c.split(max(1, AT_ONCE // y[0].numel() ** 2)) for c in (z, y)), strict=True):
            r, pull = torch.func.vjp(lambda u, of=of: self.misfit(u, of), part)  # type: ignore[misc]  # three only with has_aux
            basis = torch.eye(r.shape[1], dtype=r.dtype, device=r.device)[:, None].expand(-1, len(part), -1)
            found.append((r, torch.func.vmap(lambda row, pull=pull: pull(row)[0])(basis).transpose(0, 1)))
        r, J = (torch.cat(parts) for parts in zip(*found, strict=True))
        return r.detach(), J.detach()

    @torch.no_grad()
    def mode(self, y: Tensor) -> Tensor:
        """x*, (B, d): the best of the starts, then steps of Gauss and Newton, damped (Levenberg and Marquardt) where they overshoot."""
        starts = self.starts.flatten(1)
        scores = torch.cat([self.log_posterior(starts[:, None], part) for part in y.split(max(1, AT_ONCE // (y[0].numel() * STARTS)))], 1)
        value, best = scores.max(0)
        z, damping = starts[best], torch.ones_like(value)
        for _ in range(ROUNDS):
            r, J = self.linearise(z, y)
            H = J.mT @ J + (1 + damping[:, None, None]) * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            step = -torch.linalg.solve(H, (J.mT @ r[..., None])[..., 0] + z)
            for _ in range(3):  # along the step, half as far each time
                new = self.log_posterior((z + step)[None], y)[0]
                better = new > value
                z, value = torch.where(better[:, None], z + step, z), torch.where(better, new, value)
                step = torch.where(better[:, None], 0.0, step / 2)
            damping = torch.where(step.any(1), 8 * damping, damping / 8)
        return z

    def solve(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """V (B, d, d), h (B, d), and V^T (J^T J x* - J^T r(x*)), (B, d); kept for the y seen last, the same at all steps of a path."""
        last = None if self._last is None else self._last[0]
        alike = last is not None and (last.shape, last.device, last.dtype) == (y.shape, y.device, y.dtype)
        if not alike or not torch.equal(last, y):
            z = self.mode(y)
            r, J = self.linearise(z, y)
            h, V = torch.linalg.eigh(J.mT @ J)
            pull = h * (V.mT @ z[..., None])[..., 0] - (V.mT @ (J.mT @ r[..., None]))[..., 0]
            self._last = y.clone(), (V, h.clamp_min(0), pull)
        return self._last[1]

    @torch.no_grad()
    def law(self, y: Tensor, wider: float = 1.0) -> GaussianStep:
        """The approximation N(x*, (I + J^T J)^{-1}) of each posterior, its standard deviations `wider` times as large; batch (B,)."""
        V, h, pull = self.solve(y)
        mean = along(pull / (1 + h), V.mT).reshape(len(y), *self.starts.shape[1:])
        return GaussianStep(mean, torch.full_like(mean, wider), self.event_dim, V, (1 + h).rsqrt())

    def log_evidence(self, x_0: Tensor, y: Tensor, at: Tensor) -> Tensor:
        """log int N(x; x_0, r_t^2 I) p(y | x)^beta dx of the approximation, but for a constant of each y: (N, B, *shape) to (N, B)."""
        V, h, pull = self.solve(y)
        level = at[..., None].to(x_0.dtype)
        off = h * along(x_0.flatten(x_0.ndim - self.event_dim), V) - pull
        return -0.5 * (off**2 / (h.clamp_min(1e-12) * (1 + level * h)) + torch.log1p(level * h)).sum(-1)

    def forward(self, x_0, y, error, at=None):
        V, h, pull = self.solve(y)
        e, level = x_0.flatten(x_0.ndim - self.event_dim), at[..., None].to(x_0.dtype)
        shrink = 1 / (1 + level * h)
        delta = along(level * shrink * (pull - h * along(e, V)), V.mT)
        return Update(delta.reshape(x_0.shape), shrink.double(), V)


def laplace_guidance(problem: InverseProblem, prior: Prior, beta: float) -> LaplaceGuidance | None:
    """Where the prior is white, the problem and what it decodes smooth, and J small; else None."""
    if not prior.white or not problem.whitens or not problem.differentiable or not prior.differentiable:
        return None
    if prior.shape.numel() * problem.y_shape.numel() > LIMIT:
        return None
    return LaplaceGuidance(problem, prior, beta)
