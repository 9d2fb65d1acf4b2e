"""Train the autoencoder of a latent diffusion model (Rombach et al. 2022, arXiv 2112.10752), and see images as its latents, on which
`PriorTraining` then trains the network. `scaling_factor` and `shift_factor` of the finished autoencoder give its latents mean 0 and
variance 1 over the held-out images.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor
from torch.utils.data import TensorDataset

from priors.tensor_data import TensorData
from priors.variational import VariationalTraining
from rtb_inverse.checkpoints import load_model

AT_ONCE = 256  # images in one call of the encoder


class AutoencoderTraining(VariationalTraining):
    """
    Args:
        autoencoder: the arguments of an `AutoencoderKL` of images like those of the data, or one itself.
        output: folder of the prior; the autoencoder goes to vae/ there.
        lr, std, kl: see `VariationalTraining`.
    """

    autoencoder: Any

    def __init__(self, autoencoder: dict[str, Any] | AutoencoderKL, output: str, lr: float = 1e-3, std: float = 0.15, kl: float = 1.0):
        super().__init__(output, lr, std, kl)
        self.autoencoder = autoencoder if isinstance(autoencoder, AutoencoderKL) else AutoencoderKL(**autoencoder)

    def encode(self, x):
        code = self.autoencoder.encode(x).latent_dist
        return code.mean, code.logvar / 2

    def decode(self, z):
        return self.autoencoder.decode(z).sample

    def save(self):
        images = next(iter(self.trainer.datamodule.val_dataloader()))[0]  # type: ignore[attr-defined]
        z = sample_latents(self.autoencoder, images.to(self.device), Generator(self.device).manual_seed(0))
        self.autoencoder.register_to_config(scaling_factor=float(1 / z.std()), shift_factor=float(z.mean()))
        self.autoencoder.save_pretrained(self.output / "vae")


@torch.no_grad()
def sample_latents(autoencoder: AutoencoderKL, x: Tensor, generator: Generator) -> Tensor:
    """One z ~ q(z | x) for each image x (M, C, H, W), as the encoder gives it: neither shifted nor scaled."""
    return torch.cat([autoencoder.encode(part).latent_dist.sample(generator) for part in x.split(AT_ONCE)])


class LatentData(TensorData):
    """Other data as the latents of an autoencoder, shifted and scaled: batches (batch_size, c, h, w), encoded once, at the start.

    Args:
        data: its images, the first of its tensors, are encoded.
        folder: holds the autoencoder in vae/.
        batch_size: latents per step.
    """

    def __init__(self, data: TensorData, folder: str, batch_size: int = 64):
        autoencoder: AutoencoderKL = load_model(Path(folder) / "vae", {"AutoencoderKL": AutoencoderKL}).eval()
        config, generator = autoencoder.config, Generator().manual_seed(0)

        def latents(images: TensorDataset) -> TensorDataset:
            z = sample_latents(autoencoder, images.tensors[0], generator)
            return TensorDataset((z - (config.shift_factor or 0.0)) * config.scaling_factor)

        super().__init__(latents(data.train_set), latents(data.val_set), batch_size)
