r"""A start for priors that are cheap to draw from: E[x_0 | x_t, y] over a fixed set of the prior's own draws x_i,

    sum_i w_i x_i,      w_i ~ N(x_t; alpha_t x_i, sigma_t^2) p(y | x_i)^beta.

Where x_t is noisy and x_0 is not yet decided among far modes, no Gaussian update knows which of them y allows; these weights do, for any
likelihood. Where x_t is clean the set is too coarse, and the Gaussian update is right. A share w_t for each time joins the two,

    x0hat + w_t (x_ref - x0hat),      w_t = <x_0 - x0hat, x_ref - x0hat> / |x_ref - x0hat|^2,

measured on pairs (x_0, y) of the joint distribution, and so is what is left of the error. (Where draws cost time: `kept_draws`.)
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rtb_inverse.chains import Prior
from rtb_inverse.guidance import Update
from rtb_inverse.problems import InverseProblem
from rtb_inverse.randomness import standard_normal

SIZES = 2048, 32768  # fewest and most draws; 1,024 for each element of x between
ELEMENTS = 2**22  # of all draws together, here or in data space
DECODED = 256  # draws that are decoded at once
PAIRS = 512
IDLE = 3  # cleaner steps in a row that gain nothing, after which no more are tried
LIKELIHOODS = 2**24  # elements of a y that the draws are compared with at once
AT_ONCE = 2**21  # weights of draws at states: what fits into a processor's cache, twice as fast as 2**25
NEGLIGIBLE = 20.0  # nats below y's best draw, from where a draw is left out: at most e^-20 M = 7e-5 of the posterior are lost
SHARED = 16  # states of a y from which those draws are gathered, else weighed with weight 0


@torch.no_grad()
def decoded(decode: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """decode(x), some draws at a time."""
    return torch.cat([decode(part) for part in x.split(DECODED)])


def weighted_mean(x: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, weight: Tensor) -> Tensor:
    """sum_i w_i x_i, w_i ~ N(x_t; alpha x_i, sigma^2) exp(weight_i): x (M, d), x_t (P, d), alpha, sigma (P, 1), weight (P, M) or (M,)."""
    scale = alpha / sigma**2
    log_w = scale * x_t @ x.T - scale * alpha * (0.5 * x.square().sum(1)) + weight
    return log_w.softmax(1) @ x


class Draws(nn.Module):
    """Draws x (M, *shape) of a prior, decoded, and what an operator makes of them, once it has been asked."""

    x: Tensor
    decoded: Tensor | None
    clean: Tensor | None

    def __init__(self, prior: Prior, x: Tensor):
        super().__init__()
        self.schedule, self.shape = prior.schedule, prior.shape
        self.register_buffer("x", x)
        self.register_buffer("decoded", decoded(prior.decode, x) if prior.decodes else None, persistent=False)
        self.register_buffer("clean", None, persistent=False)
        self.last: tuple[Tensor, tuple[Tensor, ...]] | None = None
        self._decode = prior.decode if prior.decodes else None

    @property
    def data(self) -> Tensor:
        return self.x if self.decoded is None else self.decoded

    def seen(self, problem: InverseProblem) -> Tensor:
        """A(x_i), (M, *y_shape)."""
        if self.clean is None:
            self.clean = problem(self.data)
        return self.clean

    @staticmethod
    def asks_once(problem: InverseProblem) -> bool:
        """Whether the likelihood is that of A(x), whatever y."""
        return type(problem).log_likelihood is InverseProblem.log_likelihood

    def told(self, problem: InverseProblem, y: Tensor) -> tuple[Tensor, ...]:
        """`tell`; of one y after the other, as the steps of a roll-out ask for it, only once."""
        last = None if self.last is None else self.last[0]
        if last is None or (last.device, last.dtype) != (y.device, y.dtype) or not torch.equal(last, y):
            self.last = y.clone(), self.tell(problem, y)
        return self.last[1]

    def _load_from_state_dict(self, *of):
        """Other draws are decoded, and seen, anew."""
        before = self.x.clone()
        super()._load_from_state_dict(*of)
        self.last = None
        if not torch.equal(before, self.x):
            self.clean = None
            self.decoded = self.decoded if self._decode is None else decoded(self._decode, self.x)

    def tell(self, problem: InverseProblem, y: Tensor) -> tuple[Tensor, ...]:
        """What y says of the draws: their log-likelihoods."""
        return (self.log_likelihood(problem, y),)

    def log_likelihood(self, problem: InverseProblem, y: Tensor) -> Tensor:
        """log p(y | x_i), (M, B), a few observations at a time."""
        parts = y.split(max(1, LIKELIHOODS // (len(self.x) * max(1, y[0].numel()))))
        if self.asks_once(problem):
            clean = self.seen(problem)[:, None]
            return torch.cat([problem.noise.log_prob(clean, part, len(problem.y_shape)) for part in parts], 1)
        return torch.cat([problem.log_likelihood(self.data[:, None], part) for part in parts], 1)


class References(Draws):
    """
    Args:
        prior: exact draws of it are cheap.
        basis: (d, m) or None: in which directions what is left of the error is measured (`guidance.Update`).
        size: how many draws, M; by default more for larger x.

    Attributes:
        share: w_t of the K steps, the last step first, (K,).
        shrink, level: what is left of the variance there (`guidance.Update`).
    """

    share: Tensor
    shrink: Tensor
    level: Tensor
    basis: Tensor | None

    def __init__(self, prior: Prior, basis: Tensor | None = None, size: int | None = None):
        d = prior.shape.numel()
        size = min(max(1024 * d, SIZES[0]), SIZES[1], max(1, ELEMENTS // max(d, prior.data_shape.numel()))) if size is None else size
        K, options = prior.steps, prior._options()
        super().__init__(prior, prior.sample(size, torch.Generator(options["device"]).manual_seed(0)))
        self.register_buffer("basis", basis, persistent=False)
        self.register_buffer("share", torch.zeros(K, **options))
        self.register_buffer("level", torch.zeros(K, dtype=torch.float64, device=options["device"]))
        self.register_buffer("shrink", torch.zeros((K, *((basis.shape[1],) if basis is not None else prior.shape))).to(self.level))

    @property
    def chunk(self) -> int:
        """How many states to weigh the draws at, at once."""
        return max(1, AT_ONCE // len(self.x))

    def forward(self, x_t: Tensor, t: Tensor, log_likelihood: Tensor, wanted: Tensor) -> Tensor:
        """x_ref, (*batch, *shape), where `wanted` (broadcastable to the batch), else 0.

        Args:
            log_likelihood: beta log p(y | x_i), (M, B), B the last axis of the batch. A y that no draw allows is not looked at.
        """
        log_likelihood = log_likelihood.where(~log_likelihood.isneginf().all(0), 0.0).T
        log_likelihood = log_likelihood.where(log_likelihood > log_likelihood.amax(1, keepdim=True) - NEGLIGIBLE, -torch.inf)
        batch = x_t.shape[: x_t.ndim - len(self.shape)]
        states = x_t.reshape(-1, self.x[0].numel())
        alpha, sigma = (c.to(x_t).expand(batch).reshape(-1, 1) for c in self.schedule.alpha_sigma(t))
        mean = torch.zeros_like(states)
        for part, x, log_lik in self._parts(wanted.expand(batch).reshape(-1).nonzero()[:, 0], log_likelihood):
            mean[part] = weighted_mean(x, states[part], alpha[part], sigma[part], log_lik)
        return mean.reshape(x_t.shape)

    def _parts(self, rows: Tensor, log_likelihood: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Some states at a time, the draws to weigh there, and their log-likelihoods: those that y allows, where many states share it."""
        x, B = self.x.flatten(1), len(log_likelihood)
        if len(rows) < SHARED * B:
            yield from ((part, x, log_likelihood[part % B]) for part in rows.split(self.chunk))
            return
        for b in range(B):
            kept = ~log_likelihood[b].isneginf()
            near, log_lik = x[kept], log_likelihood[b, kept]
            yield from ((part, near, log_lik) for part in rows[rows % B == b].split(max(1, AT_ONCE // len(near))))

    @torch.no_grad()
    def measure(self, prior: Prior, guided: Callable, simulate: Callable, log_likelihood: Callable) -> "References":
        """Set the shares and what is left of the error; returns itself.

        Args:
            guided: (x_t, t, y) to the estimate x0hat without references.
            simulate: (x_0, generator) to y.
            log_likelihood: y to that of the draws, (M, B).
        """
        generator = torch.Generator(self.x.device).manual_seed(1)
        x_0 = prior.sample(PAIRS, generator)
        y = simulate(x_0, generator)
        log_lik = log_likelihood(y)
        idle = 0
        for k, t in reversed(list(enumerate(prior.times[:-1].flip(0)))):
            noise = standard_normal(x_0, generator)
            x_t = prior.schedule.add_noise(x_0, noise, t)
            estimate = guided(x_t, t, y)
            wanted = torch.full_like(t, idle < IDLE, dtype=torch.bool)
            move = (self(x_t, t, log_lik, wanted) - estimate) * wanted
            gain, square = ((x_0 - estimate) * move).flatten(1).sum(1), move.square().flatten(1).sum(1)
            clear = gain.mean() > 3 * gain.std() / len(gain) ** 0.5
            self.share[k] = (gain.sum() / square.sum()).clamp_max(1) if clear else 0.0
            idle = 0 if clear else idle + 1
            error = (x_0 - estimate - self.share[k] * move).double()
            if self.basis is None:
                known = prior.denoiser_error(t)
                self.shrink[k] = error.square().mean(0) / known
            else:
                flat = error.flatten(1)
                along = (flat @ self.basis.double()).square().mean(0)
                others = flat.shape[1] - len(along)
                across = (flat.square().sum(1).mean() - along.sum()) / others if others else along.mean()
                self.level[k], self.shrink[k] = across, along / across
        return self

    def left(self, k: Tensor, delta: Tensor) -> Update:
        """`delta`, and what is left of the variance at steps k."""
        if self.basis is None:
            return Update(delta, self.shrink[k])
        return Update(delta, self.shrink[k], self.basis.to(delta), self.level[k])
