"""Training a posterior with lightning: wiring only. The mathematics is in `training`, `objectives` and `behaviours`."""

import functools
import logging
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from rtb_inverse import checkpoints
from rtb_inverse.averaging import ExponentialMovingAverage
from rtb_inverse.behaviours import ObservationStore, Pool, check_weights, mixture
from rtb_inverse.bounds import BoundsOverTraining
from rtb_inverse.chains import noised_bridges, random_steps, rollout, step_shares
from rtb_inverse.checks import check_choice, check_count, check_positive, check_seed, check_writable
from rtb_inverse.data import ObservationData
from rtb_inverse.diagnostics import log_mean_weight
from rtb_inverse.evaluation import evaluate, observe, simulate_observations
from rtb_inverse.objectives import half_square, rtb, tempered, vargrad, wake_sleep
from rtb_inverse.posterior import Posterior, check_posterior
from rtb_inverse.training import denoising_loss, fit_head, line_search, path_backward, score, step_weights

OBJECTIVES = ("rtb", "vargrad", "wake_sleep")
PRECISIONS = {"32-true": None, "64-true": None, "bf16-mixed": torch.bfloat16}  # of the trainer, to that of the networks
HELD = 64  # observations on which bounds are compared
LEAST = 0.1  # share of the draws that enter a wake-sleep buffer with their weights: fewer, again and again, would be all it ever holds


def networks_alone(step: Callable) -> Callable:
    """Lightning's autocast is for the networks (`Prior.autocast`), step by step: guides, likelihoods, densities keep their precision."""

    @functools.wraps(step)
    def alone(module, batch, index):
        prior = module.posterior.prior
        prior.autocast = PRECISIONS[module.trainer.precision]
        try:
            with torch.autocast(module.device.type, enabled=False):
                return step(module, batch, index)
        finally:
            prior.autocast = None

    return alone


class PosteriorTraining(LightningModule):
    r"""Warm start by conditional denoising on simulated pairs, then RTB.

    A step of the warm start takes `states` noised pairs and one random step of each. A step of RTB takes `draws` paths for each of
    `observations` observations, from a mixture of behaviours. Without an observation to simulate (a `Reward`), the warm start
    regresses on a buffer of the averaged posterior's own draws, resampled by their exact path weights (reweighted wake-sleep), tempered
    where these are those of less than a tenth of the draws (`objectives.tempered`).

    Args:
        posterior: the posterior to train, in place.
        y: one observation to specialise on, (1, *y_shape) or y_shape; None: amortised over the observations that the problem simulates.
        data: clean examples (M, *shape) to simulate from, in place of the prior's own draws.
        warm_start: share in [0, 1] of all steps spent on the warm start; by default 0.9, or 0 where there is one y to specialise on.
        objective: of the RTB phase, "vargrad", "rtb" (learned log Z) or "wake_sleep" (on-policy paths only).
        behaviours: weights of "on_policy", "prior", "simulated", "replay".
        extra_noise: of on-policy paths at the beginning of the RTB phase, as a share of each step's standard deviation; falls linearly
            to 0.
        lr, lr_rtb, lr_log_z: peak learning rates of the chain in the warm start and in the RTB phase, and of log Z(y), which
            enters the RTB phase at the mean of the first estimates; the gates, one number per step, take ten times the chain's.
        clip: Huber threshold of the residual, in nats; null for none (`objectives.half_square`).
        pool: how many roll-outs of a network's prior to keep for simulation (draws of the posterior, in a wake-sleep warm start), of which
            `pool_start` are drawn before the first step and `pool_growth` every `refresh` steps. Each is 2 K + 1 arrays of x's size, in
            memory and in every checkpoint: take a smaller pool for large x.
        slots: observations kept with replay buffers of `capacity` x_0 each (amortised mode); a quarter of the chosen ones is renewed at
            each step.
        step_fraction, chunk_size: see `training.path_backward`.
        head_draws: of one y, draws to which a linear correction of its estimates is fitted before the first step (`training.fit_head`), as
            much of it kept as raises the ELBO; 0 for none, as for a posterior whose guide is exact.
        refresh: every how many steps the pool grows; in a wake-sleep warm start, every how many steps new draws enter the buffer.
        line_search: at the end of the warm start, go back along the line to where it began, to where ELBO and EUBO are nearest to one
            another (`training.line_search`); `kept` is how far along that is. Of one y: at the end of training, to the largest ELBO.
        bounds: how often over training, beside its end, ELBO and EUBO are measured (`BoundsOverTraining`), at least 10 steps apart; 0:
            never.
        output: folder for the finished posterior, and the bounds in training.json and .png; tried before any work. None: nothing is
            written.
        test_draws: draws per observation in test and predict.
        seed: of all randomness.
    """

    def __init__(
        self, posterior: Posterior, y: Tensor | None = None, data: Tensor | None = None, *,
        warm_start: float | None = None, objective: str = "vargrad", behaviours: dict[str, float] | None = None,
        extra_noise: float = 0.0, states: int = 256, observations: int = 8, draws: int = 8, lr: float = 2e-3, lr_rtb: float = 3e-5,
        lr_log_z: float = 1e-2, clip: float | None = 10.0, max_grad_norm: float = 1.0, ema_decay: float = 0.999, pool: int = 8192,
        pool_start: int = 2048, pool_growth: int = 256, slots: int = 256, capacity: int = 32, step_fraction: float = 1.0,
        chunk_size: int | None = 1024, head_draws: int = 512, refresh: int = 20, line_search: bool = True, bounds: int = 8,
        output: str | None = None, test_draws: int = 64, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.automatic_optimization = False
        self.posterior = check_posterior(posterior)
        if y is not None:
            y = one_observation(posterior, y)
            if len(y) != 1:
                raise ValueError(f"y must be one observation, got {len(y)}; leave y out to train over all observations")
        self.fixed = y is not None or not posterior.amortised
        self.head_draws = check_count("head_draws", head_draws, 0)
        exact = posterior.guide is not None and posterior.guide.exact
        self.has_head = y is not None and head_draws > 0 and posterior.start == "guided" and not exact
        self.objective = check_choice("objective", objective, OBJECTIVES)
        if behaviours is None:
            behaviours = {"on_policy": 1.0} if objective == "wake_sleep" else {"on_policy": 0.5, "replay": 0.25}
            behaviours |= {} if self.fixed or objective == "wake_sleep" else {"simulated": 0.25}
        self.behaviours = check_weights(behaviours)
        if self.fixed and "simulated" in self.behaviours:
            raise ValueError("behaviours: 'simulated' has no path for a fixed observation or a reward; expected on_policy, prior or replay")
        if objective == "wake_sleep" and (set(self.behaviours) != {"on_policy"} or extra_noise):
            raise ValueError(
                "behaviours must be on_policy alone, without extra_noise, for wake_sleep: it needs the exact weights of its paths"
            )
        if warm_start is None:
            warm_start = 0.9 if y is None else 0.0
        if not 0 <= warm_start <= 1:
            raise ValueError(f"warm_start must be in [0, 1], got {warm_start!r}")
        self.warm_start, self.extra_noise = warm_start, extra_noise
        self.states, self.observations, self.draws = (
            check_count(*c) for c in (("states", states), ("observations", observations), ("draws", draws, 1 if objective == "rtb" else 2))
        )
        self.lr, self.lr_rtb, self.lr_log_z = (check_positive(*c) for c in (("lr", lr), ("lr_rtb", lr_rtb), ("lr_log_z", lr_log_z)))
        self.clip = clip if clip is None else check_positive("clip", clip)
        self.max_grad_norm = check_positive("max_grad_norm", max_grad_norm)
        if not 0 <= extra_noise < math.inf:
            raise ValueError(f"extra_noise must be finite and at least 0, got {extra_noise!r}")
        if not 0 < step_fraction <= 1:
            raise ValueError(f"step_fraction must be in (0, 1], got {step_fraction!r}")
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        for count in (
            ("pool", pool),
            ("pool_start", pool_start),
            ("pool_growth", pool_growth, 0 if posterior.amortised else 1),
            ("slots", slots),
            ("capacity", capacity, 2),
        ):
            check_count(*count)
        self.ema = ExponentialMovingAverage(posterior.trainable(), ema_decay)
        self.step_fraction, self.chunk_size, self.refresh = step_fraction, chunk_size, check_count("refresh", refresh)
        self.pool_options = {"size": pool, "data": data}
        self.pool_start, self.pool_growth, self.slots, self.capacity = pool_start, pool_growth, slots, capacity
        self.bounds_count = check_count("bounds", bounds, 0)
        self.output = None if output is None else check_writable("output", output)
        self.seed = check_seed("seed", seed)
        self.y = y
        self.pool: Pool | None = None
        self.store: ObservationStore | None = None
        self.bounds: BoundsOverTraining | None = None
        self.test_draws = check_count("test_draws", test_draws, 2)
        self.line_search, self.kept = line_search, 1.0
        self._restored: dict | None = None
        self._loaded = False

    def setup(self, stage):
        if self.has_head and self.posterior.head is None:
            self.posterior.hold_head()
        if stage == "fit" and not self.has_head:
            self.posterior.head = None  # that of another training, for one y
        if self.trainer.precision not in PRECISIONS:
            raise ValueError(f"precision must be 32, 64 or bf16-mixed, got {self.trainer.precision!r}: 16 bits hold no log-density")

    # Sources of paths -------------------------------------------------------------------------------------------------------------

    def on_fit_start(self):
        self.generator = torch.Generator(self.device).manual_seed(self.seed + self.global_rank)
        simulates = self.posterior.amortised and (not self.fixed or self.warm_steps() > 0)
        self.pool = Pool(self.posterior, **self.pool_options) if simulates else None
        options = self.posterior.prior._options()
        y = None if self.y is None else self.posterior.check_y(self.y.to(self.device))
        if self.fixed:
            self.store = ObservationStore(self.posterior.shape, y, capacity=self.pool_options["size"], options=options)
        self.weights = step_weights(self.posterior)
        self.bounds = BoundsOverTraining(self.posterior, y, seed=self.seed + 2, chunk_size=self.chunk_size) if self.bounds_count else None
        self._loaded = False
        if self._restored is not None:
            self._restore(self._restored)
            return
        self.began = [parameter.detach().clone() for parameter in self.posterior.trainable()]
        if self.posterior.head is not None:
            self._fit_head(y)
        if self.pool is not None:
            self.pool.grow(self.pool_start, self.generator, progress=self.trainer.progress_bar_callback is not None)
            if not self.fixed:
                x, y = self.pool.pairs(self.slots, self.generator)
                self.store = ObservationStore(self.posterior.shape, y, x, self.capacity, options=options)
                self.store.log_reward[:, 0] = self.posterior.log_likelihood(x[None], y)[0]

    def warm_steps(self) -> int:
        return round(self.warm_start * self.trainer.max_steps)

    @networks_alone
    def training_step(self, batch, index):
        if isinstance(self.trainer.model, DistributedDataParallel):
            self.trainer.model.require_backward_grad_sync = False  # `_average_gradients` does it
        optimizer = self.optimizers()
        step, warm = self.global_step, self.warm_steps()
        if self.bounds is not None and step % max(10, math.ceil(self.trainer.max_steps / self.bounds_count)) == 0:
            self._measure_bounds(step)
        if step == warm:
            optimizer.optimizer.state.clear()
        self._set_learning_rates(optimizer, step, warm)
        optimizer.zero_grad()
        if self.pool is not None and step % self.refresh == self.refresh - 1:
            self.pool.grow(self.pool_growth, self.generator)
        loss = self._warm_step(step) if step < warm else self._path_step(step, warm)
        self._average_gradients()
        torch.nn.utils.clip_grad_norm_(self.posterior.trainable(), self.max_grad_norm)
        optimizer.step()
        self.ema.update()
        if step == warm - 1 and self.line_search and not self.fixed:
            self.ema.swap()
            self._keep_what_holds()
            self._settle()
            self.log("kept", self.kept, prog_bar=True)
        self.log("loss", loss, prog_bar=True)

    def _fit_head(self, y: Tensor) -> None:
        """As much of it as raises the ELBO on paths of their own; the same on every device."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        fit_head(self.posterior, y, self.head_draws, generator, progress=self.trainer.progress_bar_callback is not None)
        weight: Any = self.posterior.head.weight
        held = BoundsOverTraining(self.posterior, y, observations=HELD, seed=self.seed + 3, chunk_size=self.chunk_size)
        line_search([weight], [torch.zeros_like(weight)], held.gap)

    def _measure_bounds(self, step: int) -> None:
        """Of the averaged posterior, on the first device."""
        if self.trainer.is_global_zero:
            self.ema.swap()
            self.bounds.measure(step)
            self.ema.swap()

    def _warm_step(self, step: int) -> Tensor:
        if self.posterior.amortised:
            bridges, y = self.pool.bridges(self.states, self.generator)
        else:
            if step % self.refresh == 0:
                self._gather(step)
            only = torch.zeros(1, dtype=torch.long, device=self.device)  # what entered by weight is drawn evenly
            x_0, y = self.store.good(only, self.states, self.generator, uniform=1.0)[:, 0], None
            k = random_steps(step_shares(self.posterior.prior), len(x_0), self.generator).to(x_0.device)
            bridges = noised_bridges(self.posterior.prior, x_0, k, self.generator)
        loss = denoising_loss(self.posterior, bridges, y, self.weights)
        loss.backward()
        return loss.detach()

    def _keep_what_holds(self) -> None:
        """Of what the averages in the posterior have learnt, as much as brings both bounds nearest to one another, on observations that
        training has not seen (of one y, the ELBO nearest to the evidence, on paths of their own): on the line to where training began."""
        strategy, seed = self.trainer.strategy, self.seed + 1000 + self.global_rank
        y = self.store.y if self.fixed else None
        held = BoundsOverTraining(self.posterior, y, observations=HELD, seed=seed, chunk_size=self.chunk_size)

        def gap() -> Tensor:
            return strategy.reduce(held.gap(), reduce_op="mean") if self.trainer.world_size > 1 else held.gap()

        self.kept = line_search(self.posterior.trainable(), self.began, gap)

    def _average_gradients(self) -> None:
        """Over devices. The gradient comes from several backward passes of chunks, which DistributedDataParallel's own reduction, made
        for one pass, does not see (it acts on `manual_backward` only)."""
        if self.trainer.world_size > 1:
            for parameter in (*self.posterior.trainable(), *self.posterior.log_z.parameters()):
                if parameter.grad is None:  # of a step that another device has drawn: all reduce the same
                    parameter.grad = torch.zeros_like(parameter)
                parameter.grad = self.trainer.strategy.reduce(parameter.grad, reduce_op="mean")

    def _gather(self, step: int) -> None:
        """Draws of the averaged posterior enter the buffer as often as their exact path weights, tempered if need be, say."""
        self.ema.swap()
        paths = rollout(self.posterior, self.pool_growth if step else self.pool_start, None, self.generator)
        log_q, log_p, log_lik = score(self.posterior, paths, self.chunk_size)
        self.ema.swap()
        weights = tempered(log_p + log_lik - log_q, LEAST)[:, 0].softmax(0)
        pick = torch.multinomial(weights, len(weights), replacement=True, generator=self.generator)
        self.store.insert(torch.zeros(1, dtype=torch.long, device=self.device), paths.x_0[pick], log_lik[pick])

    def _path_step(self, step: int, warm: int) -> Tensor:
        store, posterior = self.store, self.posterior
        index = store.choose(self.observations, self.generator)
        if not self.fixed:
            old = index[: max(1, len(index) // 4)]
            x, y = self.pool.pairs(len(old), self.generator)
            store.renew(old, x, y, posterior.log_likelihood(x[None], y)[0])
        elif not torch.isfinite(store.log_reward).any():
            self._insert(index, rollout(posterior, self.draws, store.observations(index), self.generator).x_0)
        left = 1 - (step - warm) / max(1, self.trainer.max_steps - warm)
        paths, shares = mixture(self.behaviours, posterior, store, index, self.draws, self.generator, self.extra_noise * left)
        log_q, log_p, log_lik = score(posterior, paths, self.chunk_size)
        fresh = shares.get("on_policy", 0)
        if fresh:
            self._insert(index, paths.x_0[:fresh])
        log_w = log_p + log_lik - log_q
        estimate = log_mean_weight(log_w[:fresh]) if fresh else log_w.mean(0)
        if step == warm:
            self._place_log_z(estimate, paths.y)
        log_z = posterior.log_evidence(paths.y)
        self.log("log_z", log_z.mean(), prog_bar=True)
        if fresh and not self.extra_noise:  # else no bound
            self.log("elbo", log_w[:fresh].mean(), prog_bar=True)
            if self.bounds is not None:
                self.bounds.on_policy.append(float(log_w[:fresh].mean()))

        def loss(log_q):
            if self.objective == "rtb":
                return rtb(log_q, log_p, log_lik, log_z, self.clip)
            follow = half_square(log_z - estimate, self.clip)
            if self.objective == "wake_sleep":
                return wake_sleep(log_q, log_w) + follow
            return vargrad(log_q, log_p, log_lik, self.clip) + follow

        return path_backward(
            posterior, paths, log_q, loss, chunk_size=self.chunk_size, step_fraction=self.step_fraction, generator=self.generator
        )

    @torch.no_grad()
    def _place_log_z(self, estimate: Tensor, y: Tensor | None) -> None:
        """Shift log Z(y) to the mean of the first estimates, (B,): far from zero, its learning rate alone would take hundreds of steps."""
        shift = (estimate - self.posterior.log_evidence(y)).mean()
        if self.trainer.world_size > 1:
            shift = self.trainer.strategy.reduce(shift, reduce_op="mean")
        self.posterior.log_z.bias.add_(shift)

    def _insert(self, index: Tensor, x_0: Tensor) -> None:
        self.store.insert(index, x_0, self.posterior.log_likelihood(x_0, self.store.observations(index)))

    # Test and predict --------------------------------------------------------------------------------------------------------------

    def on_test_start(self):
        self._load_averages()

    def on_predict_start(self):
        self._load_averages()

    def _load_averages(self) -> None:
        """Judge the averaged weights: those that `fit` wrote to `output`, or those of a checkpoint, which holds the running ones too."""
        if self._loaded:
            self.ema.swap()
            self._loaded = False
            return
        if self.output is None or not (self.output / checkpoints.WEIGHTS).is_file():
            raise FileNotFoundError(
                f"output must be a folder with a trained posterior, got {str(self.output)!r}: run fit first, or give --ckpt_path"
            )
        file = self.output / checkpoints.WEIGHTS
        checkpoints.load_posterior_weights(self.posterior, checkpoints.load_weights(file), file)

    @networks_alone
    def test_step(self, batch, index):
        name, source = batch
        generator = torch.Generator(self.device).manual_seed(self.seed + 1 + index)
        look = simulate_observations if name == "simulated" else observe
        held = look(self.posterior, source, generator)
        report = evaluate(self.posterior, held, self.test_draws, generator, chunk_size=self.chunk_size)
        print(f"\n{name} observations ({len(held.y)}, {self.test_draws} draws each)\n{report}", flush=True)
        self.log_dict({f"{name}/{key}": estimate.value for key, estimate in report.numbers.items()}, batch_size=len(held.y))
        if self.output is not None:
            report.save(self.output, f"report_{name}")

    @networks_alone
    def predict_step(self, batch, index):
        y = self.posterior.check_y(batch)
        draws = self.posterior.sample(y, self.test_draws, torch.Generator(self.device).manual_seed(self.seed + 1))
        if self.output is not None:
            checkpoints.save_tensors({"x": draws.x, "log_w": draws.log_w, "y": y}, self.output / "samples.safetensors")
            print(f"{tuple(draws.x.shape)} draws (N, B, *shape) in {self.output / 'samples.safetensors'}")
        return draws

    def _settle(self) -> None:
        """The averages go on from the parameters as they are."""
        for average, parameter in zip(self.ema.averages, self.posterior.trainable(), strict=True):
            average.copy_(parameter.detach())

    # Optimisation -----------------------------------------------------------------------------------------------------------------

    def configure_optimizers(self):
        gates = self.posterior.gates()
        weights = [p for p in self.posterior.trainable() if not any(p is gate for gate in gates)]
        groups = [weights, gates, list(self.posterior.log_z.parameters())]
        return torch.optim.AdamW([{"params": group, "lr": self.lr} for group in groups], weight_decay=0.0)

    def _set_learning_rates(self, optimizer, step: int, warm: int) -> None:
        """Linear warm-up, then a cosine to a twentieth, in each phase on its own."""
        first, last, peak = (0, warm, self.lr) if step < warm else (warm, self.trainer.max_steps, self.lr_rtb)
        done, length = step - first, max(1, last - first)
        factor = min(1.0, (done + 1) / min(50, length)) * (0.05 + 0.95 * (1 + math.cos(math.pi * done / length)) / 2)
        for group, rate in zip(optimizer.param_groups, (peak, 10 * peak, self.lr_log_z), strict=True):
            group["lr"] = rate * factor

    def on_train_end(self):
        self.ema.swap()
        if self.line_search and self.y is not None:
            self._keep_what_holds()
        self._settle()
        if not self.trainer.is_global_zero:
            return
        if self.bounds is not None:
            self.bounds.measure(self.global_step)
        if self.output is not None:
            self.posterior.save_pretrained(self.output)
            if self.bounds is not None:
                self.bounds.save(self.output, kept=self.kept)

    # Resume -----------------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint):
        frozen = [name for name in checkpoint["state_dict"] if name.startswith("posterior.prior.")]
        for name in frozen:
            del checkpoint["state_dict"][name]
        checkpoint["sources"] = {
            "generator": self.generator.get_state(),
            "pool": None if self.pool is None else self.pool.state_dict(),
            "store": self.store.state_dict(),
            "began": self.began,
            "kept": self.kept,
            "bounds": None if self.bounds is None else self.bounds.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint):
        if "sources" not in checkpoint:
            raise ValueError("ckpt_path must be a checkpoint of PosteriorTraining, got one without its sources of paths")
        weights = {name.removeprefix("posterior."): v for name, v in checkpoint["state_dict"].items() if name.startswith("posterior.")}
        checkpoints.take_learnt(self.posterior, weights)
        checkpoints.check_fit(self.posterior, weights, "ckpt_path")
        for name, value in self.state_dict().items():
            if name.startswith("posterior.prior."):
                checkpoint["state_dict"][name] = value
        self._restored, self._loaded = checkpoint["sources"], True

    def _restore(self, sources: dict) -> None:
        state = sources["generator"].cpu()
        if self.global_rank == 0 and state.shape == self.generator.get_state().shape:
            self.generator.set_state(state)
        else:  # a checkpoint holds the first device's state; the others must not repeat it, and another kind of device cannot go on from it
            self.generator.manual_seed(self.seed + self.global_rank + 1000 * self.trainer.global_step)
        if self.pool is not None:
            self.pool.load_state_dict(sources["pool"])
        if self.store is None:
            saved = sources["store"]
            self.store = ObservationStore(self.posterior.shape, saved["y"].to(self.device), capacity=saved["x_0"].shape[1])
            self.store.truth = True
        self.store.load_state_dict(sources["store"])
        self.began, self.kept = [value.to(self.device) for value in sources["began"]], sources["kept"]
        if self.bounds is not None and sources.get("bounds") is not None:
            self.bounds.load_state_dict(sources["bounds"])
        self._restored = None


def fit(
    posterior: Posterior, steps: int = 500, seed: int = 0, y: Tensor | None = None, data: Tensor | None = None, *, progress: bool = True,
    trainer: dict | None = None, **options,
) -> Posterior:  # fmt: skip
    """Train a posterior in place; returns it.

    Args:
        posterior: to train.
        steps: all optimiser steps, warm start included.
        seed: of all randomness.
        y: one observation to specialise on; None: amortised.
        data: clean examples to simulate from, in place of the prior's draws.
        progress: show a progress bar.
        trainer: options of lightning's Trainer (accelerator, devices, precision, ...).
        options: of `PosteriorTraining`.
    """
    check_count("steps", steps)
    device = posterior.gate.device
    module = PosteriorTraining(posterior, y, data, seed=seed, **options)
    settings: dict[str, Any] = {
        "accelerator": "cpu" if device.type == "cpu" else "auto",
        "devices": [device.index] if device.index is not None and device.type == "cuda" else 1,
        "logger": False,
        "enable_checkpointing": False,
    }
    settings |= {"enable_model_summary": False, "enable_progress_bar": progress, "callbacks": [TQDMProgressBar()] if progress else []}
    try:
        with quiet():
            Trainer(max_steps=steps, max_epochs=1, **(settings | (trainer or {}))).fit(module, ObservationData())
    finally:
        posterior.to(device)  # lightning leaves a module on the CPU
    return posterior


def one_observation(posterior: Posterior, y: Tensor) -> Tensor:
    """y as a batch (1, *y_shape), which may be given without its first axis."""
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a torch.Tensor, got {type(y).__name__}")
    try:
        posterior.check_y(y)
    except (TypeError, ValueError):
        if y.ndim > len(posterior.problem.y_shape or ()):
            raise
        posterior.check_y(y[None])
        return y[None]
    return y


@contextmanager
def quiet() -> Iterator[None]:
    """Without lightning's advice that does not apply: the networks are in eval mode on purpose, and the steps need no workers."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    with warnings.catch_warnings():
        for message in (r".*in eval mode at the start of training", r".*treespec", r".*does not have many workers"):
            warnings.filterwarnings("ignore", message)
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)
