r"""Problems whose posterior is known: exact draws of p(x | y) and the exact evidence Z(y) = int p(x) p(y | x) dx, to measure samplers with.

Linear-Gaussian ones by linear algebra (the posterior of a Gaussian mixture is another mixture, that of a Gaussian process another
process); two-dimensional ones, for any likelihood, by the midpoint rule on a fine grid of cells of side h,

    Z(y) = h^2 sum_i p(x_i) p(y | x_i),      x | y: cell i with probability h^2 p(x_i) p(y | x_i) / Z(y), then anywhere in it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator, Tensor, nn

from priors import GaussianMixturePrior, GaussianPrior
from rtb_inverse.checks import check_choice, check_count
from rtb_inverse.guidance import affine
from rtb_inverse.noise import GaussianNoise, PoissonNoise
from rtb_inverse.problems import InverseProblem
from rtb_inverse.randomness import fixed_normal, generator_on, made_on_cpu, uniform
from tasks.inpainting import Inpainting

AT_ONCE = 2**16  # cells whose density is looked at together


@dataclass
class ExactProblem:
    """A prior and a measurement model, bound to each other, whose posterior is known."""

    prior: GaussianPrior | GaussianMixturePrior
    problem: InverseProblem

    def __post_init__(self):
        self.problem.bind(self.prior.shape)

    def draws(self, y: Tensor, n: int, generator: Generator | None = None) -> Tensor:
        """n independent draws of p(x | y) for each observation y (B, *y_shape): (n, B, *shape)."""
        raise NotImplementedError

    def log_evidence(self, y: Tensor) -> Tensor:
        """log p(y), (B,), for y (B, *y_shape)."""
        raise NotImplementedError


class LinearProblem(ExactProblem):
    """An affine operator and Gaussian noise."""

    def _flat(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The matrix A (m, d), the noise's standard deviation (m,), and y less A's offset, (B, m)."""
        matrix, offset = affine(self.problem)
        std = self.problem.noise.std.expand(self.problem.y_shape).flatten()
        dtype = self.prior._options()["dtype"]
        return matrix.to(dtype), std.to(dtype), self.problem.check_y(y).flatten(1).to(dtype) - offset.to(dtype)

    def posterior(self, y: Tensor) -> GaussianPrior | GaussianMixturePrior:
        """p(x | y) as an exact chain."""
        return self.prior.posterior(*self._flat(y))

    def draws(self, y, n, generator=None):
        return self.posterior(y).distribution.sample((n,), generator)

    def log_evidence(self, y):
        return self.prior.log_evidence(*self._flat(y))


@dataclass
class PlaneProblem(ExactProblem):
    """Any likelihood of x in R^2, on the square [-reach, reach]^2 of cells x cells, in float64."""

    cells: int = 1024
    reach: float = 16.0

    @property
    def side(self) -> float:
        """h."""
        return 2 * self.reach / check_count("cells", self.cells)

    @cached_property
    def grid(self) -> Tensor:
        """x_i, the centres of the cells, (cells^2, 2)."""
        axis = (torch.arange(self.cells, dtype=torch.float64, device="cpu") + 0.5) * self.side - self.reach
        return torch.cartesian_prod(axis, axis)

    @cached_property
    def log_prior(self) -> Tensor:
        """log p(x_i), (cells^2,)."""
        distribution = copy.deepcopy(self.prior).to("cpu", torch.float64).distribution
        return torch.cat([distribution.log_prob(part) for part in self.grid.split(AT_ONCE)])

    def log_joint(self, y: Tensor) -> Tensor:
        """log p(x_i) p(y | x_i) for one observation (1, *y_shape): (cells^2,)."""
        return self.log_prior.to(y.device) + self.problem.log_likelihood(self.grid.to(y.device)[:, None], y.double())[:, 0]

    def draws(self, y, n, generator=None):
        found = []
        for one in self.problem.check_y(y).split(1):
            log_p = self.log_joint(one)
            cell = torch.multinomial(log_p.softmax(0), n, replacement=True, generator=generator_on(log_p.device, generator))
            found.append(self.grid.to(log_p.device)[cell] + (uniform((n, 2), log_p, generator) - 0.5) * self.side)
        return torch.stack(found, 1).to(y.dtype)

    def log_evidence(self, y):
        log_area = 2 * torch.tensor(self.side, dtype=torch.float64).log()
        return torch.stack([self.log_joint(one).logsumexp(0) + log_area for one in self.problem.check_y(y).split(1)]).to(y.dtype)


def counts(x: Tensor) -> Tensor:
    """A rate > 0 for each element."""
    return 0.5 + 2 * nn.functional.softplus(x)


def bend(x: Tensor) -> Tensor:
    """x_2 + x_1^2 / 4, (M, 2) to (M, 1): one measurement that is constant along parabolas."""
    return x[..., 1:] + x[..., :1] ** 2 / 4


@made_on_cpu
def random_projection(d: int) -> Tensor:
    """The matrix of the mixtures: one row in 2-D, else two, of entries N(0, 1 / d), seeded."""
    return fixed_normal(1, (1 if d == 2 else 2, d)) / d**0.5


def gaussian_blur(n: int, sd: float = 1.5) -> Tensor:
    """Convolution of an n x n image with a Gaussian of standard deviation sd (pixels), its weights normalised at the borders too: a
    matrix (n^2, n^2)."""
    pixels = torch.arange(n, dtype=torch.float64)
    rows = torch.exp(-0.5 * ((pixels[:, None] - pixels) / sd) ** 2)
    rows = rows / rows.sum(1, keepdim=True)
    return torch.kron(rows, rows).float()


def mixture(d: int, steps: int) -> ExactProblem:
    """25 Gaussians with full covariances in R^d."""
    return LinearProblem(GaussianMixturePrior.random(d, steps=steps), InverseProblem(random_projection(d), GaussianNoise(0.5)))


def process(problem: InverseProblem, steps: int) -> ExactProblem:
    """A Matérn process of length scale 3 on 16 x 16 pixels."""
    return LinearProblem(GaussianPrior.process(16, length_scale=3.0, steps=steps), problem)


def plane(operator: Callable[[Tensor], Tensor], noise: nn.Module, steps: int) -> ExactProblem:
    """The mixture in R^2, seen otherwise."""
    return PlaneProblem(GaussianMixturePrior.random(2, steps=steps), InverseProblem(operator, noise))


EXACT_PROBLEMS: dict[str, Callable[[int], ExactProblem]] = {
    "gmm2": lambda steps: mixture(2, steps),
    "gmm10": lambda steps: mixture(10, steps),
    "gmm40": lambda steps: mixture(40, steps),
    "gmm100": lambda steps: mixture(100, steps),
    "gp_inpainting": lambda steps: process(Inpainting((1, 16, 16), "box", 0.1), steps),
    "gp_blur": lambda steps: process(InverseProblem(gaussian_blur(16), GaussianNoise(0.1)), steps),
    "abs2": lambda steps: plane(torch.abs, GaussianNoise(0.5), steps),
    "nonlinear2": lambda steps: plane(bend, GaussianNoise(0.5), steps),
    "poisson2": lambda steps: plane(counts, PoissonNoise(), steps),
}


def exact_problem(name: str, steps: int = 40) -> ExactProblem:
    """A problem whose posterior is known; the same at every call.

    Args:
        name: "gmm2", "gmm10", "gmm40", "gmm100": a mixture of 25 Gaussians in so many dimensions, seen through one (2-D) or two random
            projections, noise_std 0.5. "gp_inpainting", "gp_blur": a Gaussian process on 16 x 16 pixels whose central box is hidden, or
            which is blurred, noise_std 0.1. "abs2", "nonlinear2", "poisson2": the mixture in 2-D, seen as |x|, as x_2 + x_1^2 / 4
            (noise_std 0.5), or as Poisson counts of rates 0.5 + 2 softplus(x).
        steps: of the prior's chain.

    Raises:
        ValueError: a name that is none of these.
    """
    return EXACT_PROBLEMS[check_choice("name", name, EXACT_PROBLEMS)](steps)
