r"""Reverse chains and their paths.

A chain draws x_T, then x_s from x_t down a time grid t_K > ... > t_0, to x_0: p(tau) = p(x_T) prod_k p(x_{t_{k-1}} | x_{t_k}).
A transition is a distribution, used both to draw (`rollout`) and to score (`path_log_prob`). The forward process climbs back up
by its true Markov increments (`renoise`): x_t = a x_s + b n.

Tensors are (N, B, *shape): N draws for each of B observations. Nothing here looks at `shape`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch
from torch import Generator, Tensor, nn
from torch.distributions import Distribution
from tqdm.auto import tqdm

from rtb_inverse.checks import check_choice, check_count, check_positive
from rtb_inverse.distributions import GaussianStep, along, draw
from rtb_inverse.randomness import check_generator, fixed_normal, standard_normal
from rtb_inverse.schedules import Schedule, expand

VARIANCES = ("analytic", "small", "large")
PROBES = 8  # x_0 at which a decoder's gradient is looked for, until there is one


class Chain(nn.Module):
    """A reverse chain on a time grid. Subclasses give `transition`, and `initial` where it is not N(0, (alpha_T^2 + sigma_T^2) I).

    Attributes:
        shape: shape of one x.
        schedule: alpha_t and sigma_t.
        times: the grid, (K + 1,), float64, decreasing to the clean end.
    """

    def __init__(self, shape, schedule: Schedule, steps: int):
        super().__init__()
        self.shape = torch.Size(shape)
        self.schedule = schedule
        self.set_steps(steps)

    def set_steps(self, steps: int) -> "Chain":
        """Lay the chain on a grid of `steps` steps; returns itself."""
        self.times = self.schedule.times(check_count("steps", steps))
        return self

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def step_index(self, t: Tensor) -> Tensor:
        """Which of the K steps starts at time t, the nearest below: 0 is the last one, to the clean end."""
        ascending = self.times.flip(0).to(t.device)
        return (torch.searchsorted(ascending, t.contiguous()) - 1).clamp(0, self.steps - 1)

    def _options(self) -> dict:
        """Device and dtype of the states: those of the chain's parameters or buffers."""
        for tensor in (*self.parameters(), *self.buffers()):
            if tensor.is_floating_point():
                return {"device": tensor.device, "dtype": tensor.dtype}
        return {"device": torch.device("cpu"), "dtype": torch.get_default_dtype()}

    def initial(self, sample_shape) -> Distribution:
        """p(x_T) with batch shape `sample_shape`: N(0, (alpha_T^2 + sigma_T^2) I) at the grid's first time, which is x_T's law for
        x_0 of mean 0 and variance 1: N(0, I) for variance-preserving schedules, wherever their grid starts."""
        options = self._options()
        std = torch.hypot(*self.schedule.alpha_sigma(self.times[0])).to(**options)
        return GaussianStep(torch.zeros((*sample_shape, *self.shape), **options), std, len(self.shape))

    def transition(self, x_t: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Distribution:
        """p(x_s | x_t, y).

        Args:
            x_t: state, (*batch, *shape).
            t, s: times, s < t, float64, broadcastable to the batch.
            y: observation, (B, *y_shape) with B the last axis of the batch; None for chains that see none.

        Returns:
            A distribution with the batch shape of x_t and event shape `shape`.
        """
        raise NotImplementedError


class Prior(Chain):
    """A chain that stands for p(x). Subclasses give `denoise`; the transition is then the Gaussian step of the schedule.

    Args:
        eta: stochasticity in (0, 1]: 1 is ancestral sampling, towards 0 the steps become deterministic and lose their density.
        variance: of a step. "analytic": sd^2 + c_0^2 r_t^2, the step's own variance plus what the denoiser's error r_t^2 adds
            (Bao et al. 2022, arXiv 2201.06503), finite at the last step; "small": sd^2 (DDPM's fixed_small); "large": that of the
            forward increment (fixed_large).
        min_std: floor of the standard deviation of every step; it makes the last "small" step a distribution.

    `exact_reversal` says that the chain's paths are those of the forward process run backwards, at any number of steps (a mixture's
    are; a network's in Gaussian steps are not). `white` says that x_0 ~ N(0, I), too.

    A plain `decode` (the identity) means that data and chain share a space; `data_shape` is the shape of decode(x_0).

    `autocast` is a dtype for the networks alone (bfloat16), while states, guides and densities keep theirs.
    """

    exact_reversal = white = False
    autocast: torch.dtype | None = None
    _data_shape: torch.Size | None = None  # once it is known
    _differentiable: bool | None = None  # likewise

    def __init__(self, shape, schedule, steps, eta: float = 1.0, variance: str = "analytic", min_std: float = 0.01):
        super().__init__(shape, schedule, steps)
        self.eta = check_positive("eta", eta)
        if self.eta > 1:
            raise ValueError(f"eta must be in (0, 1], got {eta!r}")
        self.variance = check_choice("variance", variance, VARIANCES)
        self.min_std = check_positive("min_std", min_std)

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of x_0, E[x_0 | x_t]; x_t (*batch, *shape), t broadcastable to the batch."""
        raise NotImplementedError

    def denoiser_error(self, t: Tensor) -> Tensor | None:
        """r_t^2 = E (x_0 - denoise(x_t, t))^2, of shape (*t.shape, *shape), float64; None where it is not known."""
        return None

    def denoiser_covariance(self, t: Tensor) -> Tensor | None:
        """C_t = E (x_0 - denoise(x_t, t)) (x_0 - denoise(x_t, t))^T at one time t, (d, d) with d the number of elements of x, float64;
        None where it is not known. Its diagonal is `denoiser_error`."""
        return None

    def local_covariance(self, x_t: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        """C(x_t) A^T, (*batch, d, m), for C(x_t) = Cov[x_0 | x_t] = (sigma_t^2 / alpha_t) d denoise / d x_t (Tweedie's second formula,
        exact for an exact denoiser) and A (m, d): m derivatives of the denoiser."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        pull = torch.func.vjp(lambda x: self.denoise(x, t), x_t)[1]  # type: ignore[misc]  # three only with has_aux
        columns = [pull(row.reshape(self.shape).expand(x_t.shape))[0] for row in rows]
        scaled = expand(sigma**2 / alpha.clamp_min(1e-6), x_t) * torch.stack(columns)
        return scaled.flatten(x_t.ndim + 1 - len(self.shape)).movedim(0, -1)

    def gaussian_covariance(self) -> Tensor | None:
        """Cov[x_0], (d, d), float64, where x_0 is Gaussian and `denoise` exact: then one guide is exact (`GaussianGuidance`); else None."""
        return None

    def transition(self, x_t, t, s, y=None):
        return self.gaussian_step(x_t, self.denoise(x_t, t), t, s)

    def gaussian_step(self, x_t: Tensor, x_0: Tensor, t: Tensor, s: Tensor, log_scale: Tensor | float = 0.0, update=None) -> GaussianStep:
        """The step from x_t given an estimate of x_0, its standard deviations multiplied by exp(log_scale).

        `update` (a `guidance.Update`) says how an observation shrank the uncertainty of the estimate.
        """
        c_0, c_t, sd = self.schedule.reverse_step(t, s, self.eta)
        mean = expand(c_0, x_t) * x_0 + expand(c_t, x_t) * x_t
        error = self.denoiser_error(t) if self.variance == "analytic" else None
        floor = sd.new_tensor(self.min_std**2)
        if error is None:
            own = self.schedule.forward_step(s, t)[1] if self.variance == "large" else sd
            scale = expand((own**2).maximum(floor).sqrt(), x_t)
            return GaussianStep(mean, scale * _exp(log_scale), len(self.shape))
        sd2, gain2 = (c.to(x_t.device).reshape(c.shape + (1,) * len(self.shape)) for c in (sd**2, c_0**2))
        error, floor = error.to(x_t.device), floor.to(x_t.device)
        if update is None or update.shrink is None:
            scale = (sd2 + gain2 * error).maximum(floor).sqrt()
            return GaussianStep(mean, scale.to(x_t.dtype) * _exp(log_scale), len(self.shape))
        if update.basis is None:
            scale = (sd2 + gain2 * error * update.shrink).maximum(floor * update.shrink).sqrt()
            return GaussianStep(mean, scale.to(x_t.dtype) * _exp(log_scale), len(self.shape))
        if update.level is not None:
            error = update.level.reshape(update.level.shape + (1,) * len(self.shape))
        across = (sd2 + gain2 * error).maximum(floor)
        # of the variance across, this share comes from not knowing x_0, of which `shrink` is left along the basis
        unknown = (gain2 * error / across).expand(*error.shape[: error.ndim - len(self.shape)], *self.shape)
        share = along(unknown.flatten(unknown.ndim - len(self.shape)), update.basis.to(unknown) ** 2)
        ratio = (1 - share * (1 - update.shrink)).clamp_min(torch.finfo(x_t.dtype).eps).sqrt().to(x_t.dtype)
        scale = across.sqrt().to(x_t.dtype)
        return GaussianStep(mean, scale * _exp(log_scale), len(self.shape), update.basis, ratio)

    def decode(self, x_0: Tensor) -> Tensor:
        """From chain space to data space: the identity, a VAE's decoder, or any x = f(z); (*batch, *shape) to (*batch, *data_shape)."""
        return x_0

    @property
    def decodes(self) -> bool:
        """Whether `decode` is more than the identity."""
        return "decode" in vars(self) or type(self).decode is not Prior.decode

    @property
    def differentiable(self) -> bool:
        """Whether `decode` has a gradient that is not 0 at each of a few x_0 ~ N(0, I), as that of a rounded image; found once."""
        if self._differentiable is None:
            tried = fixed_normal(0, (PROBES, 1, *self.shape)).to(**self._options())
            self._differentiable = not self.decodes or any(self._has_gradient(x_0.requires_grad_()) for x_0 in tried.unbind())
        return self._differentiable

    @torch.enable_grad()
    def _has_gradient(self, x_0: Tensor) -> bool:
        try:
            x = self.decode(x_0)
        except RuntimeError:  # one by way of numpy, in most cases
            return False
        return x.requires_grad and bool(torch.autograd.grad(x.square().sum() + x.sum(), x_0)[0].any())

    @property
    def data_shape(self) -> torch.Size:
        if not self.decodes:
            return self.shape
        if self._data_shape is None:
            with torch.no_grad():
                self._data_shape = self.decode(torch.zeros((1, *self.shape), **self._options())).shape[1:]
        return self._data_shape

    @torch.no_grad()
    def examples(self, n: int) -> Tensor:
        """n x of data space (n, *data_shape), the same each time, to try an operator on: draws where they cost no network, or are kept
        (`draws`), else decode(N(0, I))."""
        options, kept = self._options(), getattr(self, "draws", None)
        generator = torch.Generator(options["device"]).manual_seed(0)
        if self.exact_reversal:
            x = self.sample(n, generator)
        elif kept is not None and len(kept) >= n:
            x = kept[:n].to(**options)
        else:
            x = torch.randn((n, *self.shape), generator=generator, **options)
        return self.decode(x)

    @torch.no_grad()
    def sample(self, n: int, generator: Generator | None = None, progress: bool = False) -> Tensor:
        """n draws x_0 in chain space, (n, *shape)."""
        return rollout(self, n, generator=generator, progress=progress).x_0[:, 0]


def _exp(log_scale: Tensor | float) -> Tensor | float:
    return log_scale.exp() if isinstance(log_scale, Tensor) else 1.0


@dataclass
class Trajectory:
    """Paths of a chain.

    Attributes:
        x: states, (K + 1, N, B, *shape), x[0] = x_T, x[K] = x_0.
        times: (K + 1,), decreasing.
        y: observations, (B, *y_shape), or None.
        log_prob: (n, B), n <= N, log density of the first n paths under the chain that `rollout` drew them with, given the start where
            it was given one; None where no chain drew the paths.
        means: of the steps that drew the states, (K, N, B, *shape), where `rollout` was asked to keep them.
        given_start: densities are those of the path given its first state.
    """

    x: Tensor
    times: Tensor
    y: Tensor | None = None
    log_prob: Tensor | None = None
    means: Tensor | None = None
    given_start: bool = False

    @property
    def x_0(self) -> Tensor:
        return self.x[-1]

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def draws(self, part: slice) -> "Trajectory":
        """The paths of some of the N draws, not scored."""
        return Trajectory(self.x[:, part], self.times, self.y, given_start=self.given_start)

    @staticmethod
    def cat(parts: "list[Trajectory]") -> "Trajectory":
        """Join paths of the same observations along N; those that a chain drew whole come first."""
        if len(parts) == 1:
            return parts[0]
        known = list(takewhile(lambda log_prob: log_prob is not None, (part.log_prob for part in parts)))
        log_prob = torch.cat(known) if known else None
        x = torch.cat([part.x for part in parts], 1)
        return Trajectory(x, parts[0].times, parts[0].y, log_prob, given_start=parts[0].given_start)


@torch.no_grad()
def rollout(
    chain: Chain, n: int, y: Tensor | None = None, generator: Generator | None = None, *, start: Tensor | None = None,
    level: int | None = None, extra_noise: float = 0.0, keep_means: bool = False, progress: bool = False,
) -> Trajectory:  # fmt: skip
    """Draw n paths for each observation.

    Args:
        chain: the chain.
        n: draws per observation, N.
        y: observations (B, *y_shape); None for a chain that sees none (then B = 1).
        generator: source of all randomness.
        start: states (n, B, *shape) at level `level` (time t_level) to start from, in place of x_T.
        level: index of the level of `start`, 1 .. K; K is x_T.
        extra_noise: each step adds independent noise of `extra_noise` times its standard deviation (exploration).
        keep_means: keep the means of the steps as well.
        progress: show a progress bar.
    """
    n, b, level = check_count("n", n), 1 if y is None else len(y), chain.steps if level is None else check_count("level", level)
    check_generator(generator)
    if level > chain.steps or (start is None and level < chain.steps):
        raise ValueError(f"level must be at most the {chain.steps} steps of the chain, and all of them without a start, got {level}")
    if start is not None and start.shape != (n, b, *chain.shape):
        raise ValueError(f"start must have shape (n, B, *shape), {(n, b, *chain.shape)}, got {tuple(start.shape)}")
    times = chain.times[chain.steps - level :]
    initial = chain.initial((n, b))
    x = draw(initial, generator) if start is None else start
    states, means, log_prob = [x], [], initial.log_prob(x) if start is None else x.new_zeros(x.shape[:2])
    for t, s in tqdm(pairwise(times), "denoising", total=len(times) - 1, disable=not progress, leave=False):
        step = chain.transition(x, t, s, y)
        x = draw(step, generator)
        if extra_noise > 0:
            noise = standard_normal(x, generator)
            x = x + extra_noise * step.stddev * noise
        log_prob = log_prob + step.log_prob(x)
        states.append(x)
        means += [step.mean] if keep_means else []
    return Trajectory(torch.stack(states), times, y, log_prob, torch.stack(means) if keep_means else None, start is not None)


@torch.no_grad()
def renoise(chain: Chain, x: Tensor, generator: Generator | None = None, *, from_level: int = 0, to_level: int | None = None) -> Tensor:
    """Climb from x at level `from_level` of the chain's grid to level `to_level` (default K) by the forward process's Markov increments.

    Args:
        x: (*batch, *shape).

    Returns:
        States from the noisiest to x itself: (to_level - from_level + 1, *batch, *shape).
    """
    to_level = chain.steps if to_level is None else to_level
    if not 0 <= from_level <= to_level <= chain.steps:
        raise ValueError(f"from_level and to_level must be levels, 0 <= from <= to <= {chain.steps}, got {from_level} and {to_level}")
    levels = chain.times.flip(0)[from_level : to_level + 1]
    states = [x]
    for s, t in pairwise(levels):
        a, b = chain.schedule.forward_step(s, t)
        noise = standard_normal(x, generator)
        states.append(a.to(x.dtype) * states[-1] + b.to(x.dtype) * noise)
    return torch.stack(states[::-1])


@dataclass
class Bridges:
    """Transitions whose x_s is integrated out: given x_t and the end x_0 of its path, x_s is N(mean, sd^2 I).

    Attributes:
        k: which of the K transitions, (M,), 0 the one from x_T.
        x_t, mean: (M, *shape).
        sd: (M,).
    """

    k: Tensor
    x_t: Tensor
    mean: Tensor
    sd: Tensor


def random_steps(shares: Tensor, m: int, generator: Generator) -> Tensor:
    """m of the K transitions, drawn by their shares (K,): (m,)."""
    return torch.multinomial(shares.to(generator.device), m, replacement=True, generator=generator)


@torch.no_grad()
def step_shares(prior: "Prior") -> Tensor:
    """How often a regression visits each of the K transitions, (K,): half evenly, half by how much of x_0 is decided there, that is by
    the fall of the denoiser's squared error over the step."""
    even = torch.full((prior.steps,), 1 / prior.steps, dtype=torch.float64)
    error = prior.denoiser_error(prior.times[:-1])
    if error is None:
        return even
    left = torch.cat([error.flatten(1).mean(1).cpu(), torch.zeros(1, dtype=torch.float64)])
    decided = (left[:-1] - left[1:]).clamp_min(0)
    return (even + decided / decided.sum()) / 2


def noised_bridges(prior: Prior, x_0: Tensor, k: Tensor, generator: Generator) -> Bridges:
    """Noise each x_0 (M, *shape) to the level before transition k (M,); x_s between it and x_0 is the forward process's."""
    noise = standard_normal(x_0, generator)
    x_t = prior.schedule.add_noise(x_0, noise, prior.times.to(x_0.device)[k])
    return Bridges(k, x_t, *forward_bridge(prior, k, x_t, x_0))


def forward_bridge(prior: Prior, k: Tensor, x_t: Tensor, x_0: Tensor) -> tuple[Tensor, Tensor]:
    """The forward process's x_s given x_t and x_0 at transitions k (*batch): mean (*batch, *shape), standard deviation (*batch)."""
    times = prior.times.to(k.device)
    c_0, c_t, sd = prior.schedule.reverse_step(times[k], times[k + 1], prior.eta)
    return expand(c_0, x_t) * x_0 + expand(c_t, x_t) * x_t, sd.to(x_t.dtype)


def chunks(trajectory: Trajectory, chunk_size: int | None, steps: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Split the transitions of a trajectory into batches of at most `chunk_size` states (at least one per observation).

    Args:
        steps: indices of the transitions to visit, in 0 .. K - 1; all by default.

    Yields:
        (k, n), each (R,): transition k of draw n, for all observations at once.
    """
    n, b = trajectory.x.shape[1:3]
    steps = torch.arange(trajectory.steps) if steps is None else steps.cpu()
    rows = torch.cartesian_prod(steps, torch.arange(n)).to(trajectory.x.device)
    size = len(rows) if chunk_size is None else max(1, check_count("chunk_size", chunk_size) // b)
    for part in rows.split(size) if len(rows) else ():  # not an empty one, which some networks cannot take
        yield part[:, 0], part[:, 1]


def step_log_prob(chain: Chain, trajectory: Trajectory, k: Tensor, n: Tensor) -> Tensor:
    """log p(x_s | x_t, y) of transitions k of draws n, one batched call: (R, B)."""
    times = trajectory.times.to(k.device)
    step = chain.transition(trajectory.x[k, n], times[k, None], times[k + 1, None], trajectory.y)
    return step.log_prob(trajectory.x[k + 1, n])


def initial_log_prob(chain: Chain, trajectory: Trajectory) -> Tensor:
    """log p(x_T), (N, B)."""
    return chain.initial(trajectory.x.shape[1:3]).log_prob(trajectory.x[0])


def path_log_prob(chain: Chain, trajectory: Trajectory, chunk_size: int | None = None) -> Tensor:
    """log p(tau | y) of whole paths, (N, B), or given their start; all steps in batched calls of at most `chunk_size` states."""
    total = trajectory.x.new_zeros(trajectory.x.shape[1:3]) if trajectory.given_start else initial_log_prob(chain, trajectory)
    for k, n in chunks(trajectory, chunk_size):
        total = total.index_add(0, n, step_log_prob(chain, trajectory, k, n))
    return total
