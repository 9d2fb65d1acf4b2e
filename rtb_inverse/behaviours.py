r"""Where training paths come from. RTB takes paths of any full-support distribution:

    on_policy   the posterior's own roll-outs, with extra noise if asked
    prior       the prior's roll-outs
    simulated   x from the prior, y from the problem, x noised forward: exact posterior paths for free
    replay      good x_0 found before, noised back to some level, denoised again by the posterior from there (backtracking)

A behaviour is a function (posterior, store, index, n, generator) -> Trajectory of n paths for each observation of `index`; `mixture`
joins several. `Pool` keeps pairs to simulate from; `ObservationStore` keeps, for each of its observations, a buffer of good x_0.
"""

import torch
from torch import Generator, Tensor

from rtb_inverse.chains import Bridges, Trajectory, forward_bridge, noised_bridges, random_steps, renoise, rollout, step_shares
from rtb_inverse.checks import check_choice, check_count, check_tensor
from rtb_inverse.posterior import Posterior
from rtb_inverse.schedules import expand


def state(**tensors) -> dict:
    return {name: value for name, value in tensors.items() if value is not None}


class Pool:
    """Where pairs (x, y) come from. A prior whose chain is the exact reversal of the forward process (an analytic one) draws anew each
    time. Of a network's prior, whose draws cost time, whole roll-outs are kept and reused with fresh y: with y simulated from its end,
    such a path is a path of the chain's own posterior, which a noised x_0 is not quite.

    Of such a path x_s, given x_t and x_0, is taken as Gaussian about (1 - rho) m + rho b, between the mean m of the prior's step and that
    of the forward process's bridge to x_0, b = c_0 x_0 + c_t x_t. rho and the spread are a regression over all paths, step by step. (On
    the exact reversal rho = 1; on a network's chain it falls to 0.9 towards the last steps.)

    Args:
        posterior: its prior draws x_0; its problem simulates y.
        size: how many roll-outs to keep; a full pool grows no more.
        data: clean examples (M, *shape) to use in place of the prior's draws.
    """

    def __init__(self, posterior: Posterior, size: int = 8192, data: Tensor | None = None):
        self.prior, self.problem, self.size = posterior.prior, posterior.problem, check_count("size", size)
        self.data = data if data is None else check_tensor("data", data, posterior.shape).to(posterior.gate.device, posterior.gate.dtype)
        self.shares = step_shares(self.prior)
        if posterior.exact_end:
            self.shares[-1] = 0  # nothing to learn
        self.keeps_paths = data is None and not self.prior.exact_reversal
        levels, options = posterior.steps if self.keeps_paths else 0, self.prior._options()
        self.states = torch.empty((levels + 1, 0, *posterior.shape), **options)  # (K + 1 or 1, size, *shape), x_0 last
        self.states = self.states if self.data is None else self.data[None]
        self.means = torch.empty((levels, 0, *posterior.shape), **options)  # of the prior's steps
        self.moments = torch.zeros((3, levels), device=options["device"], dtype=torch.float64)  # of b - m and x_s - m

    def __len__(self) -> int:
        return self.states.shape[1]

    @property
    def x(self) -> Tensor:
        """The x_0 that are kept, (size, *shape)."""
        return self.states[-1]

    def grow(self, n: int, generator: Generator, progress: bool = False) -> None:
        """Add n roll-outs of the prior, where they are kept and there is room."""
        n = min(n, self.size - len(self))
        if not self.keeps_paths or n < 1:
            return
        paths = rollout(self.prior, n, None, generator, keep_means=True, progress=progress)
        states, means = paths.x[:, :, 0], paths.means[:, :, 0]  # type: ignore[index]
        k = torch.arange(self.prior.steps, device=states.device)[:, None].expand(-1, n)
        bridge = forward_bridge(self.prior, k, states[:-1], states[-1:])[0] - means
        step = states[1:] - means
        moments = [(bridge * bridge), (bridge * step), (step * step)]
        self.moments += torch.stack([product.flatten(1).double().sum(1) for product in moments])
        self.states, self.means = torch.cat([self.states, states], 1), torch.cat([self.means, means], 1)

    def bridges(self, m: int, generator: Generator) -> tuple[Bridges, Tensor]:
        """m transitions of paths of the joint distribution, and y (m, *y_shape)."""
        if not self.keeps_paths:
            x_0, y = self.pairs(m, generator)
            return noised_bridges(self.prior, x_0, random_steps(self.shares, m, generator).to(x_0.device), generator), y
        index = torch.randint(len(self), (m,), generator=generator, device=generator.device).to(self.states.device)
        k = random_steps(self.shares, m, generator).to(index.device)
        bridges = self._between(k, self.states[k, index], self.means[k, index], self.x[index])
        return bridges, self.problem.simulate(self.prior.decode(self.x[index]), generator)

    def _between(self, k: Tensor, x_t: Tensor, mean: Tensor, x_0: Tensor) -> Bridges:
        """Transitions k (m,) of roll-outs of the prior, by the means of its steps."""
        rho = self.moments[1] / self.moments[0]
        sd = ((self.moments[2] - rho * self.moments[1]).clamp_min(0) / (len(self) * x_t[0].numel())).sqrt()
        mean = mean + expand(rho[k], mean) * (forward_bridge(self.prior, k, x_t, x_0)[0] - mean)
        return Bridges(k, x_t, mean, sd[k].to(x_t.dtype))

    def pairs(self, m: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """m pairs x_0 (m, *shape), y (m, *y_shape) of the joint distribution."""
        if self.data is None and not self.keeps_paths:
            x_0 = self.prior.sample(m, generator)
        else:
            x_0 = self.x[torch.randint(len(self), (m,), generator=generator, device=generator.device).to(self.states.device)]
        return x_0, self.problem.simulate(self.prior.decode(x_0), generator)

    def state_dict(self) -> dict:
        return {"states": self.states, "means": self.means, "moments": self.moments} if self.keeps_paths else {}

    def load_state_dict(self, saved: dict) -> None:
        for name, value in saved.items():
            setattr(self, name, value.to(self.states.device))


class ObservationStore:
    """S observations, and for each a first-in-first-out buffer of M good x_0 with their log-rewards.

    An x_0 is drawn with probability (1 - uniform) softmax(log_reward) + uniform / (number held): by reward, with a floor.

    Args:
        y: (S, *y_shape); None for a reward without observation (S = 1).
        x: (S, *shape), the x that made each y; where given it is the first x_0 of its buffer (it is a posterior draw) and stays there.
        capacity: M; at least 2 where x is given.
        uniform: weight of the uniform floor, in [0, 1].
    """

    def __init__(
        self, shape, y: Tensor | None, x: Tensor | None = None, capacity: int = 32, uniform: float = 0.2, options: dict | None = None
    ):
        if not 0 <= uniform <= 1:
            raise ValueError(f"uniform must be in [0, 1], got {uniform!r}")
        slots = 1 if y is None else len(y)
        options = options or ({} if y is None else {"device": y.device, "dtype": y.dtype})
        self.y, self.capacity, self.uniform = y, check_count("capacity", capacity, 1 if x is None else 2), uniform
        self.x_0 = torch.zeros((slots, capacity, *shape), **options)
        self.log_reward = torch.full((slots, capacity), -torch.inf, **options)
        self.cursor = torch.zeros(slots, dtype=torch.long, device=self.x_0.device)
        self.truth = x is not None
        if x is not None:
            self.insert(torch.arange(slots, device=x.device), x[None], torch.zeros((1, slots), **options))

    def __len__(self) -> int:
        return len(self.x_0)

    def observations(self, index: Tensor) -> Tensor | None:
        return None if self.y is None else self.y[index]

    def choose(self, b: int, generator: Generator) -> Tensor:
        """b observations without repetition (all, where there are fewer): (B,)."""
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        return order[:b].to(self.x_0.device)

    def renew(self, index: Tensor, x: Tensor, y: Tensor, log_reward: Tensor) -> None:
        """Replace observations by fresh pairs; their buffers start anew."""
        self.y[index] = y
        self.log_reward[index] = -torch.inf
        self.cursor[index] = 0
        self.insert(index, x[None], log_reward[None])

    def insert(self, index: Tensor, x_0: Tensor, log_reward: Tensor) -> None:
        """Add x_0 (N, B, *shape) with log-rewards (N, B) to the buffers of `index` (B,)."""
        kept = int(self.truth)  # the x that made y is never overwritten: `simulated` relies on it
        x_0, log_reward = x_0[kept - self.capacity :], log_reward[kept - self.capacity :]
        age = self.cursor[index] + torch.arange(len(x_0), device=self.cursor.device)[:, None]
        slot = torch.where(age < self.capacity, age, kept + (age - kept) % (self.capacity - kept))
        self.x_0[index.expand_as(slot), slot] = x_0
        self.log_reward[index.expand_as(slot), slot] = log_reward.where(~log_reward.isnan(), -torch.inf)
        self.cursor[index] += len(x_0)

    def good(self, index: Tensor, n: int, generator: Generator, uniform: float | None = None) -> Tensor:
        """n draws x_0 from each buffer, by reward with a floor (of weight `uniform`, by default the store's): (n, B, *shape)."""
        uniform = self.uniform if uniform is None else uniform
        log_reward = self.log_reward[index]
        held = torch.isfinite(log_reward)
        if not held.any(1).all():
            raise RuntimeError("a replay buffer is empty: insert draws before replaying")
        by_reward = log_reward.softmax(1)
        probability = (1 - uniform) * by_reward + uniform * held / held.sum(1, keepdim=True)
        pick = torch.multinomial(probability, n, replacement=True, generator=generator).T
        return self.x_0[index, pick]

    def state_dict(self) -> dict:
        return state(y=self.y, x_0=self.x_0, log_reward=self.log_reward, cursor=self.cursor)

    def load_state_dict(self, saved: dict) -> None:
        for name, value in saved.items():
            setattr(self, name, value.to(self.x_0.device))


def on_policy(
    posterior: Posterior, store: ObservationStore, index: Tensor, n: int, generator: Generator, extra_noise: float = 0.0
) -> Trajectory:
    """Roll-outs of the posterior; each step adds noise of `extra_noise` times its standard deviation."""
    return rollout(posterior, n, store.observations(index), generator, extra_noise=extra_noise)


def prior(posterior: Posterior, store: ObservationStore, index: Tensor, n: int, generator: Generator) -> Trajectory:
    """Roll-outs of the prior, paired with the observations."""
    path = rollout(posterior.prior, n, store.observations(index), generator)
    return Trajectory(path.x, path.times, path.y)


def simulated(posterior: Posterior, store: ObservationStore, index: Tensor, n: int, generator: Generator) -> Trajectory:
    """The x that made each y, noised forward n times."""
    if not store.truth:
        raise ValueError("the behaviour 'simulated' needs observations simulated from known x; use 'replay' for a fixed observation")
    x_0 = store.x_0[index, 0]
    return Trajectory(renoise(posterior, x_0.expand(n, *x_0.shape), generator), posterior.times, store.observations(index))


def replay(posterior: Posterior, store: ObservationStore, index: Tensor, n: int, generator: Generator, denoise: float = 0.5) -> Trajectory:
    """Backtracking: good x_0 noised forward to x_T. Of the n paths a share `denoise` is noised to a random level only and denoised again
    by the posterior from there; their upper part is noised on from that level."""
    x_0 = store.good(index, n, generator)
    level = int(torch.randint(1, posterior.steps + 1, (), generator=generator, device=generator.device))
    again = round(n * denoise)
    y, parts = store.observations(index), []
    if again:
        x_k = renoise(posterior, x_0[:again], generator, to_level=level)[0]
        lower = rollout(posterior, again, y, generator, start=x_k, level=level)
        upper = renoise(posterior, x_k, generator, from_level=level)
        parts.append(Trajectory(torch.cat([upper[:-1], lower.x]), posterior.times, y))
    if n > again:
        parts.append(Trajectory(renoise(posterior, x_0[again:], generator), posterior.times, y))
    return Trajectory.cat(parts)


BEHAVIOURS = {"on_policy": on_policy, "prior": prior, "simulated": simulated, "replay": replay}


def check_weights(weights: dict[str, float]) -> dict[str, float]:
    """Weights of behaviours, each >= 0 and not all 0, normalised to sum to 1."""
    for name, weight in weights.items():
        check_choice("behaviours", name, BEHAVIOURS)
        if not 0 <= weight < float("inf"):
            raise ValueError(f"behaviours: the weight of {name!r} must be finite and at least 0, got {weight!r}")
    total = sum(weights.values())
    if total <= 0:
        raise ValueError(f"behaviours must have a weight above 0, got {weights!r}")
    return {name: weight / total for name, weight in weights.items() if weight > 0}


def mixture(
    weights: dict[str, float],
    posterior: Posterior,
    store: ObservationStore,
    index: Tensor,
    n: int,
    generator: Generator,
    extra_noise: float = 0.0,
) -> tuple[Trajectory, dict[str, int]]:
    """n paths for each observation, shared out among behaviours by weight (systematically, so that each gets its share on average).

    Returns:
        The paths, on-policy ones first, and how many of the n each behaviour gave.
    """
    weights = check_weights(weights)
    edges = torch.tensor([0.0, *weights.values()], dtype=torch.float64).cumsum(0) * n
    offset = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).cpu()
    counts = torch.diff((edges + offset).floor().long())
    shares = {name: int(c) for name, c in sorted(zip(weights, counts, strict=True), key=lambda pair: pair[0] != "on_policy") if c > 0}
    parts = []
    for name, share in shares.items():
        options = {"extra_noise": extra_noise} if name == "on_policy" else {}
        parts.append(BEHAVIOURS[name](posterior, store, index, share, generator, **options))
    return Trajectory.cat(parts), shares
