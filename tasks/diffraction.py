r"""Coherent diffraction imaging: a detector in the far field counts the photons that an object scatters,

    y ~ Poisson(photons |F u|^2 + background),

F the unitary Fourier transform of the density u = (x - dark) / (1 - dark), padded with zeros (as in `phase_retrieval`, where the noise is
Gaussian). By Parseval, sum |F u|^2 = sum u^2: a pixel of density 1 scatters `photons` of them, whatever the padding.

Counts do not say where in the frame u lies, nor which way round: a shift by s multiplies F u by exp(-2 pi i k s), a turn by 180 degrees
gives its conjugate, and |F u|^2 stays. So where a prior holds an object shifted and turned in several ways, with weights w_m, the
posterior keeps the ratios of these weights. `AmbiguousObjects` is such a prior, to measure samplers with.
"""

from itertools import product

import scipy.stats
import torch
from torch import Generator, Tensor

from priors import GaussianMixturePrior, GeneratorPrior
from rtb_inverse.checks import check_finite, check_number, check_positive
from rtb_inverse.laplace import LaplaceGuidance
from rtb_inverse.noise import PoissonNoise, above_zero
from rtb_inverse.particles import Particles
from rtb_inverse.problems import InverseProblem
from rtb_inverse.schedules import expand
from tasks.exact import ExactProblem
from tasks.linear import image_shape, lay_out
from tasks.phase_retrieval import PhaseRetrieval


class Counts(PoissonNoise):
    """Poisson, but of many images (M, 1) and many y (B) the log-densities sum y log(rate) - rate - log y! are one matrix product."""

    def log_prob(self, clean, y, event_dim):
        rate = self.rate(clean.double())
        if not event_dim or rate.ndim <= event_dim + 1 or rate.shape[-1 - event_dim] > 1 or y.ndim != event_dim + 1:
            return super().log_prob(clean, y, event_dim)
        rate, y = rate.flatten(-event_dim), y.double().flatten(1)
        allowed = (self.supports(y).all(1) & ~((rate == 0).double() @ (y > 0).double().T).bool())[..., 0, :]
        log_p = (above_zero(rate).log() @ y.T)[..., 0, :] - rate.sum(-1) - torch.lgamma(y + 1).sum(1)
        return log_p.where(allowed, -torch.inf).to(clean.dtype)


class CoherentDiffraction(InverseProblem):
    """y ~ Poisson(photons |F u|^2 + background), counts (B, C, P, Q // 2 + 1) with P x Q the padded size: half of the detector's pixels,
    the frequencies of `torch.fft.rfft2`.

    u is real, so the other half repeats these rates, with counts of its own. Of each such pair of pixels one is counted here, but in the
    first column, and in the last where Q is even, both are, each with its own counts. (A whole detector says about as much as this half
    does at twice the photons.)

    Args:
        shape: of x, (C, H, W). Each channel is an image with a detector of its own.
        photons: that a pixel of density 1 (x = 1) scatters on average, over all frequencies, both halves; > 0. An image scatters
            photons * sum u^2.
        oversampling: P / H and Q / W, at least 1, rounded up to whole pixels; from 2 on y determines the whole autocorrelation. (An
            object known to fill no more than half of the frame, each way, is oversampled by 2 at 1 already; shifts are then cyclic.)
        background: mean count of a pixel without light (scatter, dark counts), at least 0.
        beam_stop: radius in pixels of the padded spectrum, at least 0: frequencies (k_1, k_2) with |k| below it are not counted; y is 0
            there. At 0 all are counted, up to 1 all but the mean of u.
        dark: the value of x where nothing is, which also surrounds the image, below 1.

    Raises:
        ValueError: a shape that is not (C, H, W); photons <= 0; an oversampling below 1; a background below 0; a beam stop below 0 or that
            leaves no pixel; dark that is not finite and below 1.
    """

    counted: Tensor

    def __init__(
        self, shape, photons: float = 1000.0, oversampling: float = 2.0, background: float = 0.0, beam_stop: float = 0.0, dark: float = -1.0
    ):  # fmt: skip
        shape, photons, background = image_shape(shape), check_positive("photons", photons), check_number("background", background, 0)
        beam_stop, dark = check_number("beam_stop", beam_stop, 0), check_number("dark", dark, below=1)
        far_field = PhaseRetrieval(shape, "intensity", oversampling)
        P, Q = far_field.padded
        k_1, k_2 = torch.fft.fftfreq(P, 1 / P)[:, None], torch.arange(Q // 2 + 1)
        counted = torch.hypot(k_1, k_2) >= beam_stop
        if not counted.any():
            raise ValueError(f"beam_stop must leave a pixel of the {P} x {Q} of the padded spectrum, got {beam_stop:g}")
        super().__init__(self.intensity, Counts(photons, background * counted.double()), linear=False)
        self.far_field, self.dark = far_field, dark
        self.register_buffer("counted", counted, persistent=False)
        self.config = {
            "shape": list(shape), "photons": photons, "oversampling": float(oversampling), "background": background,
            "beam_stop": beam_stop, "dark": dark,
        }  # fmt: skip
        self.bind(shape)

    def intensity(self, x: Tensor) -> Tensor:
        """|F u|^2, 0 behind the beam stop: (M, C, H, W) to (M, C, P, Q // 2 + 1)."""
        u = (x - self.dark) / (1 - self.dark)
        return self.far_field.observed(2 * u - 1) * self.counted

    def estimate(self, y: Tensor) -> Tensor:
        """(y - background) / photons, of mean |F u|^2, of the shape of y; below 0 where there is less than the background."""
        return (y - self.noise.background.to(y.dtype)) / self.noise.gain.to(y.dtype)

    def check_y(self, y):
        y = super().check_y(y)
        if (y * ~self.counted).any():
            raise ValueError(
                f"y must be 0 behind the beam stop, of radius {self.config['beam_stop']:g}, got {float((y * ~self.counted).max()):g}"
            )
        return y

    def condition(self, y):
        """The autocorrelation of u, as `PhaseRetrieval` shows it, of the estimated intensity, without what the beam stop hides.
        (B, 3 C, H, W)."""
        return self.far_field.condition(self.estimate(y))

    def picture(self, y: Tensor) -> Tensor:
        """log10(1 + y) on the whole detector, the other half filled in by symmetry, frequency 0 at (P // 2, Q // 2); NaN behind the beam
        stop, (B, C, P, Q)."""
        Q = self.far_field.padded[1]
        half = (1 + y).log10().where(self.counted, torch.nan)
        mirrored = half[..., 1 : (Q + 1) // 2].flip(-2, -1).roll(1, -2)  # frequency -k
        return lay_out(torch.fft.fftshift(torch.cat([half, mirrored], -1), (-2, -1)))

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "CoherentDiffraction":
        """Rebuild from `config`."""
        return cls(**config)


class EqualImages(GaussianMixturePrior):
    """A mixture of N(m_j, std^2 I), all of one std: as no eigenvectors are needed, `denoise` takes d times fewer products."""

    def denoise(self, x_t, t):
        alpha, sigma = (expand(c, x_t) for c in self.schedule.alpha_sigma(t.to(x_t.device)))
        variance = self.eigenvalues[0, 0]
        gain = alpha / (alpha**2 * variance + sigma**2)
        logits = self.log_weights + gain * (x_t @ self.means.T - alpha * (0.5 * self.means.square().sum(1)))
        mean = logits.softmax(-1) @ self.means
        return mean + variance * gain * (x_t - alpha * mean)


class AmbiguousObjects(ExactProblem):
    """Objects in the middle of nothing, each shifted and turned in several ways: a mixture of N(m, std^2 I) whose means m are all of these
    images, and coherent diffraction at an oversampling of 1, whose counts no cyclic shift and no turn changes.

    What is shifted or turned varies as the object does. So p(y | object) = int N(x; m, std^2 I) p(y | x) dx is the same for all images m
    of an object, and

        p(image | y) = w_image p(y | object) / p(y),      p(y) = sum over images of w_image p(y | object).

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
        image = self.diffraction.shape
        problem = InverseProblem(lambda x: self.diffraction.intensity(x.reshape(-1, *image)), self.diffraction.noise, linear=False)
        super().__init__(prior, problem)

    def given_object(self, y: Tensor, n: int = 1024, generator: Generator | None = None) -> list[Particles]:
        """For each object, as it is and at the first shift: weighted draws of p(x | y, object), x (n, B, n^2 of the frame), whose `log_z`
        and `log_z_error` are log p(y | object) and its standard error, (B,). With x = m + std z, z ~ N(0, I) and q(z) = N(z*, Sigma) of
        the Laplace approximation, log w = log p(z) p(y | x) / q(z)."""
        found = []
        for m in self.images[:, 0, 0].flatten(1):

            def image(z: Tensor, m: Tensor = m) -> Tensor:
                return m + self.std * z

            V, h, pull = LaplaceGuidance(self.problem, GeneratorPrior(image, m.shape)).solve(y)
            scale, noise = (1 + h).rsqrt(), torch.randn((n, *h.shape), generator=generator)
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
        image = torch.multinomial(self.log_joint(y, generator).softmax(1), n, replacement=True, generator=generator).T
        x = torch.zeros_like(of_object[0])
        for j, (o, s, turned) in enumerate(product(*map(range, self.images.shape[:3]))):
            moved = of_object[o].roll([a - b for a, b in zip(self.shifts[s], self.shifts[0], strict=True)], (-2, -1))
            x = torch.where((image == j)[..., None, None], moved.flip(-2, -1) if turned else moved, x)
        return x.flatten(-2)

    def shares(self, particles: Particles) -> Tensor:
        """Of the weight of draws x (N, B, n^2), that nearest to each image: (B, J)."""
        nearest = torch.cdist(particles.x, self.prior.means).argmin(-1)
        found = torch.zeros(nearest.shape[1], len(self.prior.means))
        return found.scatter_add(1, nearest.T, particles.weights.to(found).T)

    @classmethod
    def letters(cls, std: float = 0.05, steps: int = 40, **options) -> "AmbiguousObjects":
        """F, J and R, of 5 x 5 pixels, equally likely, each at four places and both ways round in a frame of 10 x 10, with eight unequal
        weights."""
        rows = "1111010000111001000010000", "0111100010000101001001100", "1111010001111101001010001"
        objects = torch.tensor([[float(pixel) for pixel in row] for row in rows]).reshape(3, 5, 5)
        weights = torch.tensor([[8.0, 1.0], [2.0, 5.0], [3.0, 4.0], [6.0, 7.0]]).expand(3, 4, 2)
        return cls(objects, 10, [(0, 0), (1, 4), (5, 1), (4, 5)], weights, std, steps, **options)


def clustered_p_value(shares: Tensor, known: Tensor) -> float:
    """Chi-squared test of the mean of shares (B, J), found in B independent runs, against known (J,), both of sum 1. Draws of one run may
    depend on each other: Pearson's statistic is divided by the mean design effect, which the runs' variance tells (Rao and Scott 1981),
    and is then F-distributed with J - 1 and (B - 1) (J - 1) degrees of freedom.

    Raises:
        ValueError: fewer than 2 runs.
    """
    B, J = shares.shape
    if B < 2:
        raise ValueError(f"shares must be those of 2 runs at least, got {B}")
    statistic = B * ((shares.mean(0) - known).square() / known).sum() / (shares.var(0) / known).sum()
    return float(scipy.stats.f.sf(float(statistic), J - 1, (B - 1) * (J - 1)))
