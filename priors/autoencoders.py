r"""Train the autoencoder of a latent diffusion model, and see images as its latents, on which `PriorTraining` then trains the network.

    minimise    E_q(z | x) |x - D(z)|^2 / (2 s^2) + kl KL(q(z | x) | N(0, I)),      q(z | x) = N(E(x), S(x)) diagonal

(Kingma and Welling 2014; Rombach et al. 2022, arXiv 2112.10752). `scaling_factor` and `shift_factor` of the finished autoencoder give its
latents mean 0 and variance 1 over the held-out images.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from rtb_inverse.checkpoints import load_model
from rtb_inverse.checks import check_count, check_number, check_positive, check_writable

AT_ONCE = 256  # images in one call of the encoder


class AutoencoderTraining(LightningModule):
    """
    Args:
        autoencoder: the arguments of an `AutoencoderKL` of images like those of the data, or one itself.
        output: folder of the prior; the autoencoder goes to vae/ there. Must be writable, which is tried before any work.
        std: s > 0, of x about D(z). kl: weight, at least 0. lr: learning rate, which falls to 0 along a cosine.
    """

    autoencoder: Any

    def __init__(self, autoencoder: dict[str, Any] | AutoencoderKL, output: str, std: float = 0.1, kl: float = 1.0, lr: float = 1e-3):
        super().__init__()
        self.autoencoder = autoencoder if isinstance(autoencoder, AutoencoderKL) else AutoencoderKL(**autoencoder)
        self.output, self.lr = check_writable("output", output), check_positive("lr", lr)
        self.std, self.kl = check_positive("std", std), check_number("kl", kl, 0)

    def loss(self, x: Tensor) -> Tensor:
        """Of images x (M, C, H, W), per image."""
        code = self.autoencoder.encode(x).latent_dist
        z = code.mean + code.std * torch.randn_like(code.mean)
        misfit = (x - self.autoencoder.decode(z).sample).square().flatten(1).sum(1) / (2 * self.std**2)
        return (misfit + self.kl * code.kl()).mean()

    def training_step(self, batch, index):
        loss = self.loss(batch[0])
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch[0]), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def on_train_end(self):
        if not self.trainer.is_global_zero:
            return
        data = self.trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        z = sample_latents(self.autoencoder, torch.cat([batch[0] for batch in data]).to(self.device))
        self.autoencoder.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=float(z.mean()))
        self.autoencoder.save_pretrained(self.output / "vae")


@torch.no_grad()
def sample_latents(autoencoder: AutoencoderKL, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One z ~ q(z | x) for each image x (M, C, H, W), as the encoder gives it: neither shifted nor scaled."""
    codes = [autoencoder.encode(part).latent_dist for part in x.split(AT_ONCE)]
    mean, std = torch.cat([code.mean for code in codes]), torch.cat([code.std for code in codes])
    return mean + std * torch.randn(mean.shape, generator=generator, device=mean.device)


class LatentData(LightningDataModule):
    """Other data as the latents of an autoencoder, shifted and scaled: batches (batch_size, c, h, w), encoded once, at the start.

    Args:
        data: whose `train_set` and `val_set` hold images first.
        folder: holds the autoencoder in vae/.
        batch_size: latents per step.
    """

    def __init__(self, data: LightningDataModule, folder: str, batch_size: int = 64):
        super().__init__()
        self.batch_size = check_count("batch_size", batch_size)
        autoencoder: AutoencoderKL = load_model(Path(folder) / "vae", {"AutoencoderKL": AutoencoderKL}).eval()
        config, generator = autoencoder.config, torch.Generator().manual_seed(0)

        def latents(images: TensorDataset) -> TensorDataset:
            z = sample_latents(autoencoder, images.tensors[0], generator)
            return TensorDataset((z - (config.shift_factor or 0.0)) * config.scaling_factor)

        self.train_set, self.val_set = latents(data.train_set), latents(data.val_set)  # type: ignore[attr-defined]

    def train_dataloader(self):
        return DataLoader(self.train_set, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self):
        return DataLoader(self.val_set, len(self.val_set))
