r"""The evidence bounds over training.

    ELBO  E_q(tau | y) log w   over the posterior's own paths,
    EUBO  E_p(tau | y) log w   over paths of the chain's exact posterior: prior roll-outs, for the y simulated from their ends,

with log w = log p(tau) + beta log p(y | x_0) - log q(tau | y). The ELBO alone rewards a sampler that keeps to one mode; the EUBO does not.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Generator, Tensor

from rtb_inverse.chains import Prior, Trajectory, path_log_prob, rollout
from rtb_inverse.diagnostics import Estimate, elbo, eubo
from rtb_inverse.posterior import Posterior

OWN = 2**20  # in the low 32 bits of a seed, which are all that torch uses on the CPU


@contextmanager
def full_precision(prior: Prior) -> Iterator[None]:
    """Within it networks are not rounded to 16 bits: bounds compare two chains, which are to be the same ones each time."""
    was, prior.autocast = prior.autocast, None
    try:
        yield
    finally:
        prior.autocast = was


class BoundsOverTraining:
    """Both bounds of a posterior in training, time and again on the same observations and with the same random numbers, so that what
    changes along the curve is the posterior. All randomness is its own: a training measured is the training not measured.

    Args:
        posterior: to be measured, in training.
        y: one observation, (1, *y_shape), that it specialises on: it has an ELBO only, as a `Reward` has. None: amortised.
        observations: how many to simulate; how many paths to draw, where there is one y or none.
        seed: of all randomness.
        chunk_size: most states in one scoring call.

    Attributes:
        curve: one dictionary per measurement: "step" (optimiser steps taken), "elbo" and, where y was simulated, "eubo" (`Estimate`s as
            dictionaries: over observations, or paths of one y), and "elbo_on_policy" of the training's own on-policy paths since the
            measurement before (of the running weights, on other observations; over steps), where there were any.
    """

    def __init__(self, posterior: Posterior, y: Tensor | None = None, observations: int = 12, seed: int = 0, chunk_size: int | None = None):
        self.posterior, self.y, self.n, self.seed = posterior, y, observations, seed
        self.chunk_size = chunk_size
        self.paths: Trajectory | None = None
        self.curve: list[dict] = []
        self.on_policy: list[float] = []
        if y is None and posterior.amortised:
            self._simulate()

    def _generator(self, own: bool = False) -> Generator:
        """Other noise for the posterior's own paths than for those that y was simulated from: else they would know the truth."""
        return Generator(self.posterior.gate.device).manual_seed(self.seed ^ OWN if own else self.seed)

    def _simulate(self) -> None:
        """One prior roll-out for each observation, and the log-density of it together with its y."""
        posterior, generator = self.posterior, self._generator()
        with full_precision(posterior.prior):
            paths = rollout(posterior.prior, self.n, None, generator)
        self.y = posterior.problem.simulate(posterior.decode(paths.x_0[:, 0]), generator)
        self.paths = Trajectory(paths.x.transpose(1, 2), paths.times, self.y)
        self.log_joint = paths.log_prob.T + posterior.log_likelihood(self.paths.x_0, self.y)

    @torch.no_grad()
    def log_weights(self) -> tuple[Tensor, Tensor | None]:
        """log w of paths of the posterior's own, (1, B), and, where y was simulated, of the exact one's, (1, B)."""
        posterior = self.posterior
        with full_precision(posterior.prior):
            paths = rollout(posterior, self.n if self.paths is None else 1, self.y, self._generator(own=True))
            log_joint = path_log_prob(posterior.prior, paths, self.chunk_size) + posterior.log_likelihood(paths.x_0, paths.y)
            own = (log_joint - paths.log_prob).flatten()[None]
            return own, None if self.paths is None else self.log_joint - path_log_prob(posterior, self.paths, self.chunk_size)

    def gap(self) -> Tensor:
        """EUBO less ELBO: how far the posterior and the exact one are from one another, both ways; infinite for a posterior whose states
        leave the finite numbers. Of one y, or none, the ELBO, negated."""
        own, exact = self.log_weights()
        gap = (0.0 if exact is None else exact.mean()) - own.mean()
        return torch.where(gap.isfinite(), gap, torch.inf)

    def measure(self, step: int) -> None:
        """Add a point to the curve; points of this step or later ones, of a run that was broken off, go."""
        own, exact = self.log_weights()
        point = {"step": step, "elbo": Estimate.of(elbo(own)).to_dict()}
        if exact is not None:
            point["eubo"] = Estimate.of(eubo(exact)).to_dict()
        if self.on_policy:
            point["elbo_on_policy"] = Estimate.of(torch.tensor(self.on_policy)).to_dict()
        self.on_policy = []
        self.curve = [before for before in self.curve if before["step"] < step] + [point]

    def state_dict(self) -> dict:
        return {"curve": self.curve, "on_policy": self.on_policy}

    def load_state_dict(self, saved: dict) -> None:
        self.curve, self.on_policy = list(saved["curve"]), list(saved["on_policy"])

    def save(self, folder: str | Path, **about) -> None:
        """Write training.json, with what else there is to say about the training, and training.png."""
        from rtb_inverse.plots import bounds_figure

        about |= {"observations": 1 if self.paths is None else self.n, "paths_per_observation": self.n if self.paths is None else 1}
        (Path(folder) / "training.json").write_text(json.dumps(about | {"bounds": self.curve}, indent=2, allow_nan=False) + "\n")
        bounds_figure(self.curve, Path(folder) / "training.png")
