r"""A latent diffusion model as the prior: a network in the latents z of an autoencoder, x = D(z / s + m) in data space.

s is the autoencoder's `scaling_factor`, which gives the latents that the network was trained on a variance near 1, and m its
`shift_factor` (0 where it has none). The chain and its steps are those of z; likelihoods are those of the pixels.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from priors.diffusers_prior import AUTOENCODER_FOLDERS, DiffusersPrior
from rtb_inverse.checkpoints import load_model, read_json
from rtb_inverse.checks import check_count, check_positive, check_tensor

AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


class LatentPrior(DiffusersPrior):
    """p(z) by a pretrained diffusion network, and x = D(z); both frozen and in eval mode for ever.

    Args:
        network, schedule, steps, options: as in `DiffusersPrior`, of the latents.
        autoencoder: `AutoencoderKL` or `VQModel`.
        scaling_factor: s > 0; by default that of the autoencoder's config.
        chunk_size: most latents in one call of the autoencoder.

    Raises:
        TypeError: another autoencoder. ValueError: one without scaling factor, or of other latents than the network's.
    """

    def __init__(
        self, network: nn.Module, schedule, autoencoder: nn.Module, steps: int = 20, *, scaling_factor: float | None = None,
        chunk_size: int = 64, **options,
    ):  # fmt: skip
        super().__init__(network, schedule, steps, **options)
        if not isinstance(autoencoder, tuple(AUTOENCODERS.values())):
            raise TypeError(f"autoencoder must be an AutoencoderKL or a VQModel, got {type(autoencoder).__name__}")
        config: Any = autoencoder.config
        if config.latent_channels != self.shape[0]:
            raise ValueError(f"autoencoder must have the network's {self.shape[0]} latent channels, got {config.latent_channels}")
        scale = getattr(config, "scaling_factor", None) if scaling_factor is None else scaling_factor
        if scale is None or (scaling_factor is None and "scaling_factor" in config.get("_use_default_values", ())):
            raise ValueError("scaling_factor must be given, got None: the autoencoder's config has none (0.18215 is Stable Diffusion 1's)")
        self.scaling_factor, self.chunk_size = check_positive("scaling_factor", scale), check_count("chunk_size", chunk_size)
        self.shift_factor = getattr(config, "shift_factor", None) or 0.0
        self.autoencoder = autoencoder.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, steps: int | None = None, eta: float | None = None, variance: str | None = None,
        min_std: float | None = None, scaling_factor: float | None = None,
    ) -> "LatentPrior":  # fmt: skip
        """As `DiffusersPrior.from_pretrained`, of a pipeline folder with vae/ or vqvae/ beside unet/. `scaling_factor` is to be given where
        the autoencoder's config.json has none; what diffusers takes then, 0.18215, is right for one model and silently wrong for others."""
        return cls._load(folder_or_hub_id, steps=steps, eta=eta, variance=variance, min_std=min_std, scaling_factor=scaling_factor)

    @classmethod
    def _read(cls, folder: Path) -> dict[str, Any]:
        found = [folder / name for name in AUTOENCODER_FOLDERS if (folder / name).is_dir()]
        if not found:
            raise FileNotFoundError(f"folder_or_hub_id: {folder} holds no autoencoder, expected a folder vae/ or vqvae/ beside unet/")
        autoencoder: Any = load_model(found[0], AUTOENCODERS)
        if "scaling_factor" not in read_json(found[0] / "config.json"):
            autoencoder.register_to_config(scaling_factor=None)
        return super()._read(folder) | {"autoencoder": autoencoder}

    def decode(self, x_0):
        """From latents (*batch, *shape) to pixels (*batch, *data_shape)."""
        z = x_0.reshape(-1, *self.shape) / self.scaling_factor + self.shift_factor
        decoder: Any = self.autoencoder
        with sdpa_kernel(SDPBackend.MATH):  # the fused kinds of attention have no second derivative, which the guide needs
            x = torch.cat([decoder.decode(part).sample for part in z.split(self.chunk_size)])
        return x.reshape(*x_0.shape[: x_0.ndim - len(self.shape)], *x.shape[1:])

    def encode(self, x: Tensor) -> Tensor:
        """From images (*batch, *data_shape) to latents (*batch, *shape), their mean where the autoencoder gives a distribution."""
        encoder: Any = self.autoencoder
        images = check_tensor("x", x.reshape(-1, *x.shape[-len(self.data_shape) :]), self.data_shape)
        found = [encoder.encode(part) for part in images.split(self.chunk_size)]
        z = torch.cat([code.latents if hasattr(code, "latents") else code.latent_dist.mean for code in found])
        return ((z - self.shift_factor) * self.scaling_factor).reshape(*x.shape[: -len(self.data_shape)], *z.shape[1:])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the prior as `from_pretrained` reads it: what `DiffusersPrior` writes, and the autoencoder in vae/ or vqvae/."""
        super().save_pretrained(folder)
        autoencoder: Any = self.autoencoder
        autoencoder.register_to_config(scaling_factor=self.scaling_factor)
        autoencoder.save_pretrained(Path(folder) / AUTOENCODER_FOLDERS[isinstance(autoencoder, VQModel)])
