r"""Coherent diffraction with a known answer: objects of which a prior holds several images that the counts cannot tell apart.

A mixture sum_m w_m N(m, std^2 I) over images m that are cyclic shifts and turns of a few objects. What is shifted or turned varies as the
object does, so p(y | object) = int N(x; m, std^2 I) p(y | x) dx is the same for all images m of an object, and

    p(image | y) = w_image p(y | object) / p(y),      p(y) = sum over images of w_image p(y | object).
"""

import copy
from itertools import product

import torch
from torch import Generator, Tensor, nn

from priors import GaussianMixturePrior, GeneratorPrior
from rtb_inverse.checks import check_finite, check_positive
from rtb_inverse.laplace import LaplaceGuidance
from rtb_inverse.particles import Particles
from rtb_inverse.problems import InverseProblem
from rtb_inverse.randomness import generator_on, standard_normal
from rtb_inverse.schedules import expand
from tasks.diffraction import CoherentDiffraction
from tasks.exact import ExactProblem


class EqualImages(GaussianMixturePrior):
    """A mixture of N(m_j, std^2 I), all of one std: as no eigenvectors are needed, `denoise` takes d times fewer products."""

    def denoise(self, x_t, t):
        alpha, sigma = (expand(c, x_t) for c in self.schedule.alpha_sigma(t.to(x_t.device)))
        variance = self.eigenvalues[0, 0]
        gain = alpha / (alpha**2 * variance + sigma**2)
        logits = self.log_weights + gain * (x_t @ self.means.T - alpha * (0.5 * self.means.square().sum(1)))
        mean = logits.softmax(-1) @ self.means
        return mean + variance * gain * (x_t - alpha * mean)


class Flat(nn.Module):
    """The counts to expect of flat images, (M, n^2)."""

    def __init__(self, diffraction: CoherentDiffraction):
        super().__init__()
        self.diffraction = diffraction

    def forward(self, x: Tensor) -> Tensor:
        return self.diffraction.intensity(x.reshape(-1, *self.diffraction.shape))


class AmbiguousObjects(ExactProblem):
    """Objects in the middle of nothing, each shifted and turned in several ways: a mixture of N(m, std^2 I) whose means m are all of these
    images, and coherent diffraction at an oversampling of 1, whose counts no cyclic shift and no turn changes.
    p(y | object) is found by importance sampling from the Laplace approximation around the object.

    Args:
        objects: densities u (O, h, w), 0 around the object.
        size: of the frame, n, at least 2 h and 2 w: so the frame itself oversamples them by 2.
        shifts: of the upper left corner, S pairs (down, right).
        weights: > 0, (O, S, 2), the last axis: as it is, turned.
        std: within an image, > 0, in units of x, which is 2 u - 1.
        options: of `CoherentDiffraction`: photons, background, beam_stop.

    Attributes:
        images: x, (O, S, 2, n, n); the prior's means, in that order. Flat, (n^2,), to the prior and the problem.
        diffraction: the problem on images (1, n, n).

    Raises:
        ValueError: a frame that is too small; std <= 0; shapes that do not fit; what `CoherentDiffraction` refuses.
    """

    prior: GaussianMixturePrior

    def __init__(self, objects: Tensor, size: int, shifts, weights: Tensor, std: float = 0.1, steps: int = 40, **options):
        _, h, w = check_finite("objects", objects).shape
        if size < 2 * max(h, w):
            raise ValueError(f"size must be at least twice that of the objects, {h} x {w}, got {size!r}")
        if weights.shape != (expected := (len(objects), len(shifts), 2)):
            raise ValueError(f"weights must have shape (O, S, 2) = {expected}, got {tuple(weights.shape)}")
        frame = torch.nn.functional.pad(2 * objects - 1, (0, size - w, 0, size - h), value=-1.0)
        self.shifts = [tuple(shift) for shift in shifts]
        moved = torch.stack([frame.roll(shift, (1, 2)) for shift in self.shifts], 1)
        self.images = torch.stack([moved, moved.flip(-2, -1)], 2)
        self.std, self.diffraction = check_positive("std", std), CoherentDiffraction((1, size, size), oversampling=1, **options)
        means = self.images.flatten(0, 2).flatten(1)
        covariance = (self.std**2 * torch.eye(size**2)).expand(len(means), -1, -1)
        prior = EqualImages(weights.flatten(), means, covariance, steps=steps)
        super().__init__(prior, InverseProblem(Flat(self.diffraction), copy.deepcopy(self.diffraction.noise), linear=False))

    def given_object(self, y: Tensor, n: int = 1024, generator: Generator | None = None) -> list[Particles]:
        """For each object, as it is and at the first shift: weighted draws of p(x | y, object), x (n, B, n^2 of the frame), whose `log_z`
        and `log_z_error` are log p(y | object) and its standard error, (B,). With x = m + std z, z ~ N(0, I) and q(z) = N(z*, Sigma) of
        the Laplace approximation, log w = log p(z) p(y | x) / q(z)."""
        found = []
        for m in self.images[:, 0, 0].flatten(1):

            def image(z: Tensor, m: Tensor = m) -> Tensor:
                return m.to(z.device) + self.std * z

            V, h, pull = LaplaceGuidance(self.problem, GeneratorPrior(image, m.shape).to(y.device)).solve(y)
            scale, noise = (1 + h).rsqrt(), standard_normal(h, generator, (n, *h.shape))
            z = torch.einsum("bde,nbe->nbd", V, pull * scale**2 + scale * noise)
            log_ratio = 0.5 * (noise.square() - z.square()).sum(-1) + scale.log().sum(-1)
            found.append(Particles(image(z), self.problem.log_likelihood(image(z), y) + log_ratio))
        return found

    def log_joint(self, y: Tensor, generator: Generator | None = None) -> Tensor:
        """log w_image + log p(y | object), (B, J), J = 2 O S images; its softmax is p(image | y)."""
        log_p = torch.stack([draws.log_z for draws in self.given_object(y, generator=generator)], 1)
        return self.prior.log_weights + log_p.repeat_interleave(self.prior.means.shape[0] // log_p.shape[1], 1)

    def log_evidence(self, y):
        return self.log_joint(y).logsumexp(1)

    def draws(self, y, n, generator=None):
        of_object = [draws.resample(n, generator).x.unflatten(-1, self.images.shape[-2:]) for draws in self.given_object(y, n, generator)]
        share = self.log_joint(y, generator).softmax(1)
        image = torch.multinomial(share, n, replacement=True, generator=generator_on(share.device, generator)).T
        x = torch.zeros_like(of_object[0])
        for j, (o, s, turned) in enumerate(product(*map(range, self.images.shape[:3]))):
            moved = of_object[o].roll([a - b for a, b in zip(self.shifts[s], self.shifts[0], strict=True)], (-2, -1))
            x = torch.where((image == j)[..., None, None], moved.flip(-2, -1) if turned else moved, x)
        return x.flatten(-2)

    def shares(self, particles: Particles) -> Tensor:
        """Of the weight of draws x (N, B, n^2), that nearest to each image: (B, J)."""
        nearest = torch.cdist(particles.x, self.prior.means).argmin(-1)
        found = particles.x.new_zeros(nearest.shape[1], len(self.prior.means))
        return found.scatter_add(1, nearest.T, particles.weights.to(found).T)

    @classmethod
    def letters(cls, std: float = 0.05, steps: int = 40, **options) -> "AmbiguousObjects":
        """F, J and R, of 5 x 5 pixels, equally likely, each at four places and both ways round in a frame of 10 x 10, with eight unequal
        weights."""
        rows = "1111010000111001000010000", "0111100010000101001001100", "1111010001111101001010001"
        objects = torch.tensor([[float(pixel) for pixel in row] for row in rows]).reshape(3, 5, 5)
        weights = torch.tensor([[8.0, 1.0], [2.0, 5.0], [3.0, 4.0], [6.0, 7.0]]).expand(3, 4, 2)
        return cls(objects, 10, [(0, 0), (1, 4), (5, 1), (4, 5)], weights, std, steps, **options)
