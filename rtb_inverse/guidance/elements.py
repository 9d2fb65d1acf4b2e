"""Guides of problems that see each element of x by itself, and of one noise level for each observation."""

from dataclasses import replace

import torch
from torch import Tensor

from rtb_inverse.guidance.base import Guide, Update
from rtb_inverse.guidance.matrices import CovarianceGuidance
from rtb_inverse.noise_range import NoiseRange
from rtb_inverse.problems import InverseProblem


class MaskGuidance(Guide):
    """The operator picks elements of x: the update is exact element by element."""

    mask: Tensor
    noise_variance: Tensor

    def __init__(self, problem: InverseProblem):
        super().__init__()
        self.register_buffer("mask", problem.mask, persistent=False)
        std = torch.zeros(problem.shape, dtype=problem.noise.std.dtype, device=problem.mask.device)
        std[problem.mask] = problem.noise.std.expand(problem.y_shape).flatten()
        self.register_buffer("noise_variance", std.double() ** 2, persistent=False)

    def forward(self, x_0, y, error, at=None):
        weight = torch.where(self.mask, 1 / (error + self.noise_variance), torch.zeros_like(error))
        image = y.new_zeros((len(y), *self.mask.shape))
        image[:, self.mask] = y.flatten(1)
        gain, residual = error * weight, image - x_0
        return Update(gain.to(x_0.dtype) * residual, 1 - gain, slope=lambda: weight.to(x_0.dtype) * residual)


class ElementGuidance(Guide):
    """Each element is seen by itself, in whatever way: with the likelihood smoothed by the denoiser's error (`problem.smoothed`),

        log Z(x0hat) = log int N(x; x0hat, r^2) p(y | x) dx,

    the update is exact, by Tweedie's formulas: delta = r^2 d log Z / d x0hat, and the variance r^2 + r^4 d^2 log Z / d x0hat^2 is left.
    It follows y also where the likelihood's own gradient is 0 (HDR).
    """

    def __init__(self, problem: InverseProblem):
        super().__init__()
        self.smoothed = problem.smoothed

    def forward(self, x_0, y, error, at=None):
        def slope(mean):
            return torch.func.grad(lambda m: self.smoothed(m, y.double(), error).sum())(mean)

        first, pull = torch.func.vjp(slope, x_0.double())  # type: ignore[misc]  # three only with has_aux
        (second,) = pull(torch.ones_like(first))  # the elements do not see each other
        delta, shrink = (error * first).to(x_0.dtype), (1 + error * second).clamp_min(1e-6)
        return Update(delta, shrink, slope=lambda: first.to(x_0.dtype))


class LevelGuidance(Guide):
    """Each observation has its own noise level l, which y carries: noise of variance l^2 sigma^2 under an error r^2 moves the estimate, and
    shrinks its variance, as sigma^2 under r^2 / l^2 does. So the guide of level 1 serves them all, if its update is linear in y; that by a
    covariance takes l^2 as it is."""

    per_observation = True

    def __init__(self, problem: NoiseRange, guide: Guide, event_dim: int):
        super().__init__()
        self.problem, self.guide, self.event_dim = problem, guide, event_dim

    def at(self, x_t, t):
        return self.guide.at(x_t, t)

    def forward(self, x_0, y, error, at=None):
        measurement, log_level = self.problem.split(y)
        level = log_level.double().exp().reshape(-1, *(1,) * self.event_dim)
        if isinstance(self.guide, CovarianceGuidance):
            update = self.guide(x_0, measurement, error, at, level.flatten() ** 2)
        else:
            update = self.guide(x_0, measurement, error / level**2, at)
        own = update.slope
        return replace(update, slope=None if own is None else lambda: own() / level.to(x_0.dtype) ** 2)
