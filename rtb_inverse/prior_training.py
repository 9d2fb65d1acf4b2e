"""Train a diffusion prior by denoising score matching, and write it as a diffusers folder."""

import json
import math
from pathlib import Path

import torch
from diffusers import ModelMixin, SchedulerMixin
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn

from rtb_inverse.averaging import ExponentialMovingAverage
from rtb_inverse.chains import Prior
from rtb_inverse.checkpoints import ERROR_FILE, WEIGHTS, load_into, load_weights, save_tensors
from rtb_inverse.checks import check_count, check_positive, check_tensor, check_writable
from rtb_inverse.denoiser_error import DenoiserError
from rtb_inverse.distributions import global_state_from
from rtb_inverse.networks import outputs
from rtb_inverse.randomness import generator_on, standard_normal
from rtb_inverse.schedules import schedule_from_config

ODD = 2654435761  # apart by it, the steps of one seed and the next have no numbers in common


def generator_of_step(module: LightningModule, seed: int = 0) -> torch.Generator:
    """For the random numbers of the training step at hand, which then depend on nothing before it: so an interrupted training resumes to
    the same result."""
    number = module.trainer.fit_loop.total_batch_idx * module.trainer.world_size + module.global_rank
    return torch.Generator(module.device).manual_seed(ODD * seed + number)  # of which a CPU takes the lowest 32 bits


class PriorTraining(LightningModule):
    r"""Denoising score matching: minimise w(t) |target - network(x_t, t)|^2 over uniform t and noise.

    Args:
        network: a diffusers `UNet2DModel` or `UNet1DModel`.
        scheduler: a diffusers scheduler; its config says what x_t and the target are.
        output: folder for the finished prior; must be writable, which is tried before any work.
        steps: number of sampling steps that the prior recommends.
        lr: peak learning rate; linear warm-up over `warmup` steps, then a cosine to zero at the end of training: by the steps
            done or the share of the Trainer's `max_time` spent, whichever is further.
        ema_decay: decay of the averaged weights, which are the ones written.
        min_snr: weights are clipped as in Min-SNR (Hang et al. 2023, arXiv 2303.09556) at this signal-to-noise ratio, where given.
        error_draws: the denoiser's error is measured on at least so many draws of the prior.
        start: folder of a finished prior whose weights `network` continues from, for example one that a shorter run wrote.
        seed: of times and noise; those of a step depend on nothing before it, so that an interrupted training resumes to the same result.
    """

    network: ModelMixin

    def __init__(
        self, network: nn.Module, scheduler: SchedulerMixin, output: str, steps: int = 20, lr: float = 1e-3, warmup: int = 200,
        ema_decay: float = 0.999, weight_decay: float = 0.0, min_snr: float | None = None,
        error_draws: int = 2048, start: str | None = None, seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.network, self.scheduler = network, scheduler
        self.schedule = schedule_from_config(scheduler)
        self.output, self.steps = check_writable("output", output), check_count("steps", steps)
        if start is not None:
            file = Path(start) / "unet" / WEIGHTS
            load_into(network, load_weights(file), file)
        self.lr, self.warmup, self.weight_decay = check_positive("lr", lr), warmup, weight_decay
        if min_snr is not None and self.schedule.prediction_type not in ("v_prediction", "epsilon", "sample"):
            raise ValueError(f"min_snr must be None for a network of prediction_type {self.schedule.prediction_type!r}, got {min_snr!r}")
        self.min_snr, self.error_draws = min_snr, check_count("error_draws", error_draws)
        self.ema, self.seed = ExponentialMovingAverage(network.parameters(), ema_decay), check_count("seed", seed, 0)

    def loss(self, x_0: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Mean weighted squared error on clean x_0, (M, *shape)."""
        grid = self.schedule.times(1000).to(x_0.device)[:-1]
        t = grid[torch.randint(len(grid), x_0.shape[:1], generator=generator_on(x_0.device, generator), device=x_0.device)]
        noise = standard_normal(x_0, generator)
        x_t = self.schedule.add_noise(x_0, noise, t)
        output = self.network(x_t, self.schedule.network_time(t).to(x_0.dtype)).sample
        error = (output - self.schedule.target(x_0, noise, t)).square().flatten(1).mean(1)
        if self.min_snr is None:
            return error.mean()
        alpha, sigma = self.schedule.alpha_sigma(t)
        snr = (alpha / sigma) ** 2
        unit = {"v_prediction": snr + 1, "epsilon": snr, "sample": torch.ones_like(snr)}[self.schedule.prediction_type]
        return (error * (snr.clamp_max(self.min_snr) / unit).to(error.dtype)).mean()

    def training_step(self, batch, index):
        x = check_tensor("x", batch[0] if isinstance(batch, (list, tuple)) else batch)
        generator = generator_of_step(self, self.seed)
        with global_state_from(generator):  # a network's dropout
            loss = self.loss(x, generator)
        self.log("loss", loss, prog_bar=True)
        return loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.ema.update()  # before a callback at the end of the batch writes a checkpoint

    def on_validation_epoch_start(self):
        self.ema.swap()

    def validation_step(self, batch, index):
        generator = torch.Generator(self.device).manual_seed(index)
        x = batch[0] if isinstance(batch, (list, tuple)) else batch
        losses = torch.stack([self.loss(x, generator) for _ in range(16)])
        self.log("val_loss", losses.mean(), prog_bar=True, batch_size=len(x))

    def on_validation_epoch_end(self):
        self.ema.swap()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        total = self.trainer.estimated_stepping_batches
        timer = next((callback for callback in self.trainer.callbacks if isinstance(callback, Timer)), None)

        def factor(n: int) -> float:
            progress = max(0, n - self.warmup) / max(1, total - self.warmup)
            if timer is not None and timer.time_remaining() is not None:
                elapsed = timer.time_elapsed()
                progress = max(progress, elapsed / (elapsed + timer.time_remaining()))
            return min(1, (n + 1) / max(1, self.warmup)) * (1 + math.cos(math.pi * min(progress, 1))) / 2

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_end(self):
        if self.trainer.is_global_zero:
            self.ema.swap()
            self.save(self.output)
            self.ema.swap()

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Write network, scheduler, recommended steps and the denoiser's error, as `DiffusersPrior.from_pretrained` reads them."""
        self.network.save_pretrained(folder / "unet")
        self.scheduler.save_pretrained(folder / "scheduler")
        (folder / "prior_config.json").write_text(json.dumps({"steps": self.steps}) + "\n")
        save_tensors(self.measure_error().tensors(), folder / ERROR_FILE)

    def measure_error(self) -> DenoiserError:
        """The denoiser's error on the prior's own draws, since they are what a posterior is about. The variances of the steps that
        draw them need an error too: that on held-out data."""
        generator, x_0 = torch.Generator(self.device).manual_seed(0), self.held_out()

        def measure(x_0: Tensor) -> DenoiserError:
            return DenoiserError.measure(self.schedule, self.denoise, x_0, x_0.ndim - 1, generator=generator)

        return measure(_Draft(self, measure(x_0)).sample(len(x_0), generator))

    def denoise(self, x_t: Tensor, t: Tensor) -> Tensor:
        time = self.schedule.network_time(t).to(x_t.device, x_t.dtype).expand(len(x_t))
        return self.schedule.to_x_0(outputs(self.network, x_t, time), x_t, t)

    def held_out(self) -> Tensor:
        """Clean examples of the first validation batch, repeated to at least `error_draws` (each gets its own noise)."""
        batch = next(iter(self.trainer.datamodule.val_dataloader()))  # type: ignore[attr-defined]
        x = (batch[0] if isinstance(batch, (list, tuple)) else batch).to(self.device)
        return x.repeat(-(-self.error_draws // len(x)), *(1,) * (x.ndim - 1))


class _Draft(Prior):
    """The chain of a network in training."""

    def __init__(self, training: PriorTraining, error: DenoiserError):
        super().__init__(error.variance.shape[1:], training.schedule, training.steps)
        self.denoise = lambda x_t, t: training.denoise(x_t[:, 0], t)[:, None]  # type: ignore[method-assign]
        self.denoiser_error = error.forward  # type: ignore[method-assign]
        self._like = next(training.network.parameters())

    def _options(self):
        return {"device": self._like.device, "dtype": self._like.dtype}
