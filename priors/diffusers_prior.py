"""A diffusers model as the prior: a network of the UNet2DModel or UNet1DModel kind, and its scheduler's config."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet1DModel, UNet2DModel
from torch import Tensor, nn

from rtb_inverse.chains import Prior
from rtb_inverse.checkpoints import (
    DRAWS_FILE,
    ERROR_FILE,
    load_array,
    load_model,
    load_weights,
    read_json,
    resolve_folder,
    save_tensors,
    write_json,
)  # fmt: skip
from rtb_inverse.checks import check_count, check_tensor
from rtb_inverse.denoiser_error import DenoiserError
from rtb_inverse.networks import outputs
from rtb_inverse.schedules import Schedule, schedule_from_config

MODELS = {"UNet2DModel": UNet2DModel, "UNet1DModel": UNet1DModel}
EXAMPLES = 512  # on which the denoiser's error is measured
AUTOENCODER_FOLDERS = ("vae", "vqvae")


class DiffusersPrior(Prior):
    """p(x) by a pretrained diffusion network; frozen and in eval mode for ever.

    Args:
        network: `UNet2DModel` or `UNet1DModel`; called as network(x_t, t).sample.
        schedule: a `Schedule`, or a diffusers scheduler (its config is read).
        steps: K, the number of denoising steps of the chain.
        error: r_t^2 and C_t, how far x0hat is from x_0 on average. Without it the steps take the variance "small" and guidance
            supposes x_0 ~ N(0, I); `measure_error` finds it.
        draws: some of the prior's own, (M, *shape), the references of its posteriors; `keep_draws` makes them.
        eta, variance, min_std: see `rtb_inverse.chains.Prior`.
    """

    network: UNet2DModel | UNet1DModel
    error: DenoiserError | None
    draws: Tensor | None

    def __init__(
        self, network: nn.Module, schedule, steps: int = 20, *, error: DenoiserError | None = None, eta: float = 1.0,
        variance: str = "analytic", min_std: float = 0.01, draws: Tensor | None = None,
    ):  # fmt: skip
        config: Any = network.config
        size, channels = config.sample_size, config.in_channels
        if size is None:
            raise ValueError("network.config.sample_size must be set, got None: the prior needs the shape of x")
        size = tuple(size) if isinstance(size, (tuple, list)) else (size,) * (1 if isinstance(network, UNet1DModel) else 2)
        schedule = schedule if isinstance(schedule, Schedule) else schedule_from_config(schedule)
        if config.out_channels != channels:
            learnt = " (with variances, which the steps here do not take)" * (config.out_channels == 2 * channels)
            raise ValueError(f"network must give as many channels as it takes, {channels}, got {config.out_channels}{learnt}")
        if getattr(network, "class_embedding", None) is not None:
            raise ValueError("network must not ask for a class, got one with a class embedding: a prior is of x alone")
        super().__init__((channels, *size), schedule, steps, eta, variance, min_std)
        self.network = network.requires_grad_(False).eval()
        self.error = error
        self.register_buffer("draws", None if draws is None else check_tensor("draws", draws, self.shape).float(), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_hub_id: str | Path,
        steps: int | None = None,
        eta: float | None = None,
        variance: str | None = None,
        min_std: float | None = None,
    ) -> "DiffusersPrior":
        """Load a pipeline folder (model_index.json with a `unet` and a `scheduler` folder), or a folder that holds one model's
        config.json beside a scheduler_config.json.

        Args:
            folder_or_hub_id: a local folder, or the id of a hub repository, which is downloaded.
            steps, eta, variance, min_std: of the chain; by default what the folder recommends (prior_config.json), else the constructor's.

        Raises:
            FileNotFoundError: a missing folder or file. ValueError: truncated weights, pickled weights, an unknown model or scheduler.
        """
        return cls._load(folder_or_hub_id, steps=steps, eta=eta, variance=variance, min_std=min_std)

    @classmethod
    def _load(cls, folder_or_hub_id: str | Path, **given) -> Any:
        """From a folder, but for what is given and not None."""
        return cls(**cls._read(resolve_folder(folder_or_hub_id)) | {name: value for name, value in given.items() if value is not None})

    @classmethod
    def _read(cls, folder: Path) -> dict[str, Any]:
        """The constructor's arguments, from a folder."""
        held = [name for name in AUTOENCODER_FOLDERS if (folder / name).is_dir()]
        if held and cls.decode is Prior.decode:
            raise ValueError(
                f"folder_or_hub_id: {folder} holds an autoencoder, {held[0]}/, and its latents are no images: LatentPrior reads it"
            )
        network_folder = folder / "unet" if (folder / "unet").is_dir() else folder
        scheduler_folder = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
        config_file = scheduler_folder / "scheduler_config.json"
        if not config_file.is_file():
            raise FileNotFoundError(
                f"folder_or_hub_id: {folder} has no scheduler_config.json, expected one beside the model or in scheduler/"
            )
        schedule = schedule_from_config(read_json(config_file))
        network = load_model(network_folder, MODELS)
        tables = load_weights(folder / ERROR_FILE) if (folder / ERROR_FILE).is_file() else {}
        if tables and not {"times", "variance"} <= set(tables) <= {"times", "variance", "factor_times", "factor"}:
            raise ValueError(f"{folder / ERROR_FILE} must hold times and variance, perhaps factor_times and factor, got {sorted(tables)}")
        options = read_json(folder / "prior_config.json") if (folder / "prior_config.json").is_file() else {}
        draws = load_array("draws", folder / DRAWS_FILE) if (folder / DRAWS_FILE).is_file() else None
        return {"network": network, "schedule": schedule, "error": DenoiserError(**tables) if tables else None, "draws": draws, **options}

    def train(self, mode: bool = True) -> "DiffusersPrior":
        return super().train(False)

    def denoise(self, x_t, t):
        return self.schedule.to_x_0(self.predict(self.network, x_t, t), x_t, t)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
        """Call a diffusers network on states (*batch, C, *size); returns its output in the same batch shape and their dtype."""
        batch = x_t.shape[: -len(self.shape)]
        time = self.schedule.network_time(t).to(x_t.device, x_t.dtype).expand(batch).flatten()
        with nullcontext() if self.autocast is None else torch.autocast(x_t.device.type, self.autocast):
            output = outputs(network, x_t.reshape(-1, *x_t.shape[len(batch) :]), time)
        return output.reshape(*batch, *output.shape[1:]).to(x_t.dtype)

    def denoiser_error(self, t):
        return None if self.error is None else self.error(t)

    def denoiser_covariance(self, t):
        return None if self.error is None else self.error.covariance(t)

    @torch.no_grad()
    def measure_error(self, x: Tensor | None = None, knots: int = 64, generator: torch.Generator | None = None) -> "DiffusersPrior":
        """Measure r_t^2 and C_t at up to `knots` times on clean examples x (M, *shape): draws of the prior, or data held out from
        training. Returns itself, as `save_pretrained` keeps it.

        By default on the draws that the prior keeps, or on `EXAMPLES` of its own, drawn twice: the steps that draw them need it too.
        """
        if x is None and self.draws is None:
            generator = generator or torch.Generator(self._options()["device"]).manual_seed(0)
            for _ in range(2):
                self.measure_error(self.sample(EXAMPLES, generator, progress=True), knots, generator)
            return self
        x = check_tensor("x", self.draws if x is None else x, self.shape).to(self._options()["device"])
        self.error = DenoiserError.measure(self.schedule, self.denoise, x, len(self.shape), knots, generator=generator)
        return self

    def keep_draws(self, n: int, generator: torch.Generator | None = None, batch_size: int = 1024) -> "DiffusersPrior":
        """Draw n, `batch_size` at a time, and keep them in `draws`, in half precision where that can hold them, as they are saved. Returns
        itself."""
        check_count("n", n)
        check_count("batch_size", batch_size)
        draws = torch.cat([self.sample(min(batch_size, n - i), generator) for i in range(0, n, batch_size)])
        half = draws.half().to(draws)
        self.draws = half if half.isfinite().all() else draws
        return self

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the prior as `from_pretrained` reads it: unet/, scheduler/, the recommended steps, the table of the denoiser's error."""
        folder = Path(folder)
        self.network.save_pretrained(folder / "unet")
        write_json(self.schedule.config(), folder / "scheduler" / "scheduler_config.json")
        write_json({"steps": self.steps, "eta": self.eta, "variance": self.variance, "min_std": self.min_std}, folder / "prior_config.json")
        if self.error is not None:
            save_tensors(self.error.tensors(), folder / ERROR_FILE)
        if self.draws is not None:
            half = self.draws.half()
            save_tensors({"draws": half if torch.equal(half.to(self.draws), self.draws) else self.draws}, folder / DRAWS_FILE)
