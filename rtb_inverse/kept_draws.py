"""What some draws x_i of a network's prior say of x_0 given y, where x_t does not yet.

At the noisy steps x_t does not say which mode it will be, and no Gaussian update knows which ones y allows. Draws do, for any problem that
can be simulated, in two ways:

    m(y) ~ E[x_0 | y]               kernel ridge regression of the x_i on y_i ~ p(y | x_i); found once for each y;
    x_ref = sum_i w_i x_i,          w_i ~ N(x_t; alpha_t x_i, sigma_t^2) p(y | x_i)^b_t, where the noise is Gaussian.

Of few draws none is near y, and the plain likelihood picks one; tempered by b_t it still says which modes y allows. The network's estimate
is moved by a share v_t of the way to m(y), then by a share w_t of the way to x_ref, and then the guide makes it fit y. Shares and tempers
are measured for each step, on draws that are told by the others; shares are 0 where these say nothing that the guide does not know.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_tensor
from rtb_inverse.problems import GaussianNoise, InverseProblem
from rtb_inverse.randomness import standard_normal
from rtb_inverse.references import AT_ONCE, DECODED, IDLE, Draws, weighted_mean
from rtb_inverse.schedules import expand

FEWEST = 16  # draws
TOLD, ELEMENTS = (32, 128), 2**15  # fewest and most of the draws that are told by the others, and their elements; at most a quarter
TEMPERS = 0.003, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0  # tried at each step
WIDTHS, RIDGES = (0.3, 1.0, 3.0, 10.0), (1e-3, 1e-2, 1e-1, 1.0)  # tried, of the median squared distance, and of the kernel's diagonal
TRIED = 1024  # pairs at most, on which they are


class KernelRegression(nn.Module):
    r"""E[x | y] = mean + k(y, y_i) (K + lambda)^{-1} (x_i - mean), with k(y, y') = exp(-|y - y'|^2 / width).

    Args:
        pairs, of_y, of_x: M pairs of y (m,) and x (d,).
    """

    y: Tensor
    coefficients: Tensor
    mean: Tensor
    width: Tensor

    def __init__(self, pairs: int, of_y: int, of_x: int, **options):
        super().__init__()
        self.register_buffer("y", torch.zeros((pairs, of_y), **options))
        self.register_buffer("coefficients", torch.zeros((pairs, of_x), **options))
        self.register_buffer("mean", torch.zeros(of_x, **options))
        self.register_buffer("width", torch.ones((), **options))

    def forward(self, y: Tensor) -> Tensor:
        """y (B, m); returns (B, d)."""
        return self.mean + torch.exp(-torch.cdist(y, self.y).square() / self.width) @ self.coefficients

    @torch.no_grad()
    def fit(self, y: Tensor, x: Tensor) -> "KernelRegression":
        """To pairs y (M, m), x (M, d), with the width and the ridge that predict best a fifth of them, or of `TRIED`, from the others;
        returns itself."""
        self.y.copy_(y)
        self.mean.copy_(x.mean(0))
        y, off = y.double(), (x - self.mean).double()
        some = min(TRIED, len(y))
        known = some - max(1, some // 5)
        distance = torch.cdist(y[:some], y[:some]).square()
        unit = distance.median().clamp_min(torch.finfo(torch.float32).tiny)

        def solve(kernel, ridge, targets):
            ridge = ridge * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
            return torch.cholesky_solve(targets, torch.linalg.cholesky(kernel + ridge))

        def loss(width, ridge):
            kernel = torch.exp(-distance / (width * unit))
            found = kernel[known:, :known] @ solve(kernel[:known, :known], ridge, off[:known])
            return float((found - off[known:some]).square().mean())

        width, ridge = min(product(WIDTHS, RIDGES), key=lambda tried: loss(*tried))
        self.width.copy_(width * unit)
        self.coefficients.copy_(solve(torch.exp(-torch.cdist(y, y).square() / (width * unit)), ridge, off))
        return self


class KeptDraws(Draws):
    """
    Args:
        prior: whose draws they are.
        x: the draws, (M, *shape), at least `FEWEST`.
        problem: bound to its shape.

    Attributes:
        regressed: v_t of the K steps, the last step first, (K,).
        share, temper: w_t and b_t.
    """

    regressed: Tensor
    share: Tensor
    temper: Tensor

    def __init__(self, prior: Prior, x: Tensor, problem: InverseProblem):
        options = prior._options()
        super().__init__(prior, check_tensor("references", x, prior.shape).to(**options, copy=True))
        if len(x) < FEWEST:
            raise ValueError(f"references must hold at least {FEWEST} draws, got {len(x)}")
        size = max(prior.shape.numel(), prior.data_shape.numel())
        self.told_apart = min(max(TOLD[0], min(TOLD[1], ELEMENTS // size)), len(x) // 4)
        self.regression = KernelRegression(len(x) - self.told_apart, problem.y_shape.numel(), prior.shape.numel(), **options)
        for name in ("regressed", "share", "temper"):
            self.register_buffer(name, torch.zeros(prior.steps, **options))

    def tell(self, problem, y):
        """m(y) (B, *shape), and the log-likelihoods of the draws (M, B) where they are asked for."""
        mean = self.regression(y.reshape(len(y), -1)).reshape(-1, *self.shape)
        return mean, self.log_likelihood(problem, y) if self.share.any() else mean.new_zeros(len(self.x), len(y))

    def weighs(self, problem: InverseProblem) -> bool:
        """Whether likelihoods of all draws are a product of matrices: else, of many y, they would take longer than the network."""
        return isinstance(problem.noise, GaussianNoise) and self.asks_once(problem)

    def log_likelihood(self, problem, y):
        """Up to a term of y."""
        std = problem.noise.std.to(y)
        clean, y = ((v / std).reshape(len(v), -1) for v in (self.seen(problem), y))
        return clean @ y.T - 0.5 * clean.square().sum(1, keepdim=True)

    def weighted(self, x_t: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        """x_ref at x_t (P, *shape), t (P,), with weights of exp(weight) in place of the likelihood's, (P, M)."""
        alpha, sigma = (c.to(x_t)[:, None] for c in self.schedule.alpha_sigma(t))
        return weighted_mean(self.x.flatten(1), x_t.flatten(1), alpha, sigma, weight).reshape(x_t.shape)

    def forward(self, x_t: Tensor, t: Tensor, k: Tensor, mean: Tensor, log_likelihood: Tensor, estimate: Tensor) -> Tensor:
        """The estimate of x_0 (*batch, *shape), moved.

        Args:
            x_t: (*batch, *shape). t, k: times and steps, which broadcast to the batch. mean, log_likelihood: what `tell` says of B
                observations, B the last axis of the batch.
        """
        batch = x_t.shape[: x_t.ndim - len(self.shape)]
        t, k = (c.expand(batch).reshape(-1) for c in (t, k))
        moved = torch.lerp(estimate, mean.expand_as(estimate), expand(self.regressed[k].reshape(batch), estimate))
        states, of_y, moved = x_t.reshape(-1, *self.shape), log_likelihood.T, moved.reshape(-1, *self.shape)
        rows, parts = (self.share[k] > 0).nonzero()[:, 0], []
        for part in rows.split(max(1, AT_ONCE // len(self.x))) if len(rows) else ():
            reference = self.weighted(states[part], t[part], self.temper[k[part], None] * of_y[part % len(of_y)])
            parts.append(torch.lerp(moved[part], reference, expand(self.share[k[part]], reference)))
        return (moved.index_put((rows,), torch.cat(parts)) if parts else moved).reshape(estimate.shape)

    @torch.no_grad()
    def measure(self, prior: Prior, problem: InverseProblem, guided: Callable) -> "KeptDraws":
        """Fit the regression, and set shares and tempers; returns itself.

        Args:
            guided: (x_t (1, P, *shape), t, y) to the estimate without the draws.
        """
        generator, P = torch.Generator(self.x.device).manual_seed(5), self.told_apart
        parts = tqdm(self.data.split(DECODED), "simulating from the prior's draws", delay=5, leave=False)
        every = torch.cat([problem.simulate(part, generator) for part in parts])
        x_0, y = self.x[:P], every[:P]
        mean = self.regression.fit(every[P:].reshape(len(every) - P, -1), self.x[P:].flatten(1))(y.reshape(P, -1)).reshape(x_0.shape)
        tempers, idle = TEMPERS if self.weighs(problem) else (), 0
        log_lik = self.log_likelihood(problem, y).T if tempers else mean.new_zeros(P, len(self.x))
        log_lik[:, :P] = -torch.inf
        steps = list(enumerate(prior.times[:-1].flip(0)))[::-1]
        for k, t in tqdm(steps, "measuring what they say", delay=5, leave=False):
            noise = standard_normal(x_0, generator)
            x_t, times = prior.schedule.add_noise(x_0, noise, t), t.to(x_0.device).expand(P)
            estimate = guided(x_t[None], t, y)[0]
            self.regressed[k], gain = worth(x_0 - estimate, mean - estimate)
            estimate, best = torch.lerp(estimate, mean, self.regressed[k]), 0.0
            for b in tempers:
                share, more = worth(x_0 - estimate, self.weighted(x_t, times, b * log_lik) - estimate)
                if more > best:
                    best, self.share[k], self.temper[k] = more, share, b
            idle = 0 if gain + best > 0 else idle + 1
            if idle == IDLE:
                break
        return self


def worth(off: Tensor, move: Tensor) -> tuple[float, float]:
    """The share of a move, (P, *shape), that brings the estimates nearest, and how much of their squared error it takes; 0 unless that is
    clear."""
    gain, square = ((u * move).flatten(1).sum(1) for u in (off, move))
    if not gain.mean() > 3 * gain.std() / len(gain) ** 0.5:
        return 0.0, 0.0
    return float((gain.sum() / square.sum()).clamp_max(1)), float(gain.mean() ** 2 / square.mean())
