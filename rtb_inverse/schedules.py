r"""Noise schedules: x_t = alpha_t x_0 + sigma_t n, n ~ N(0, I).

Everything a Gaussian reverse step needs follows from alpha_t and sigma_t. With the forward transition
x_t = a x_s + b n, a = alpha_t / alpha_s, b^2 = sigma_t^2 - a^2 sigma_s^2, the step from t to s < t is

    sd^2 = eta^2 sigma_s^2 b^2 / sigma_t^2
    x_s  = alpha_s x_0 + sqrt(sigma_s^2 - sd^2) (x_t - alpha_t x_0) / sigma_t + sd n

(Song et al. 2021, arXiv 2010.02502, eq. 7 and 12, for any alpha and sigma). eta = 1 is ancestral sampling (DDPM).
Every negative time is the clean end: alpha = 1, sigma = 0.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor

from rtb_inverse.checks import check_choice, check_count, check_positive

CLEAN = -1.0
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction", "score")
# Schedulers that differ only in how they solve the reverse process: their networks share one variance-preserving table.
VARIANCE_PRESERVING = (
    "DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "UniPCMultistepScheduler",
)  # fmt: skip


def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Append axes to a coefficient of shape (*batch) so that it broadcasts against x of shape (*batch, *shape), in x's dtype
    and where x lies."""
    return coefficient.to(x).reshape(coefficient.shape + (1,) * (x.ndim - coefficient.ndim))


def rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index], (*index.shape, *table.shape[1:]), which of a single index would wait for a GPU."""
    return table.index_select(0, index.flatten()).reshape(index.shape + table.shape[1:])


class Schedule:
    """alpha_t, sigma_t and the meaning of the network's output. Times are float64 tensors of any shape.

    Args:
        prediction_type: what the network predicts, one of `PREDICTION_TYPES`: the noise n ("epsilon"), alpha_t n - sigma_t x_0
            ("v_prediction"), x_0 ("sample"), n - x_0 ("flow_prediction"), the gradient of log p(x_t) ("score").
        clip_sample: where given, the estimate of x_0 is clamped to [-clip_sample, clip_sample].
    """

    prediction_type: str
    clip_sample: float | None = None

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, float64, in the shape of t."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """A diffusers scheduler config from which `schedule_from_config` makes this schedule again."""
        raise NotImplementedError

    def times(self, steps: int) -> Tensor:
        """The grid t_K > ... > t_1 > t_0 = -1 (clean), shape (steps + 1,), float64."""
        raise NotImplementedError

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is told of the time t."""
        return t

    def to_x_0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of x_0 that the network's output at (x_t, t) stands for; shapes (*batch, *shape), t of shape (*batch)."""
        alpha_t, sigma_t = (expand(c, x_t) for c in self.alpha_sigma(t))
        match self.prediction_type:
            case "epsilon":
                x_0 = (x_t - sigma_t * output) / alpha_t
            case "score":
                x_0 = (x_t + sigma_t**2 * output) / alpha_t
            case "v_prediction":
                x_0 = (alpha_t * x_t - sigma_t * output) / (alpha_t**2 + sigma_t**2)
            case "flow_prediction":
                x_0 = (x_t - sigma_t * output) / (alpha_t + sigma_t)
            case _:
                x_0 = output
        return x_0 if self.clip_sample is None else x_0.clamp(-self.clip_sample, self.clip_sample)

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say at x_t = alpha_t x_0 + sigma_t noise: the inverse of `to_x_0`."""
        alpha_t, sigma_t = (expand(c, x_0) for c in self.alpha_sigma(t))
        match self.prediction_type:
            case "epsilon":
                return noise
            case "score":
                return -noise / sigma_t
            case "v_prediction":
                return alpha_t * noise - sigma_t * x_0
            case "flow_prediction":
                return noise - x_0
            case _:
                return x_0

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t noise."""
        alpha_t, sigma_t = (expand(c, x_0) for c in self.alpha_sigma(t))
        return alpha_t * x_0 + sigma_t * noise

    def forward_step(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of the Markov increment x_t = a x_s + b n of the forward process, s < t."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        a = alpha_t / alpha_s
        return a, (sigma_t**2 - a**2 * sigma_s**2).clamp_min(0).sqrt()

    def reverse_step(self, t: Tensor, s: Tensor, eta: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """(c_0, c_t, sd) of the step x_s = c_0 x_0 + c_t x_t + sd n, each in the shape of t and s broadcast."""
        (alpha_s, sigma_s), (alpha_t, sigma_t) = self.alpha_sigma(s), self.alpha_sigma(t)
        _, b = self.forward_step(s, t)
        sd = eta * sigma_s * b / sigma_t
        c_t = (sigma_s**2 - sd**2).clamp_min(0).sqrt() / sigma_t
        return alpha_s - c_t * alpha_t, c_t, sd


def require_prediction_type(schedule: Schedule) -> None:
    check_choice("prediction_type", schedule.prediction_type, PREDICTION_TYPES)
    if schedule.clip_sample is not None:
        check_positive("clip_sample", schedule.clip_sample)


@dataclass(frozen=True)
class VariancePreserving(Schedule):
    """A variance-preserving table of diffusers: alpha_t^2 = alphas_cumprod[t], for t in 0 .. T - 1, and alpha_t^2 + sigma_t^2 = 1.

    The beta schedule, the spacing of the time steps and the zero-SNR rescaling are those of `diffusers.DDPMScheduler`, which makes
    both tables. Between integer times (grids of more than T steps) the angle atan(sigma / alpha) is interpolated linearly.

    Raises:
        ValueError: epsilon or score prediction with alpha = 0 at the last time (nothing about x_0 can be read from the noise there).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    clip_sample: float | None = None

    def __post_init__(self):
        require_prediction_type(self)
        check_choice("beta_schedule", self.beta_schedule, ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"))
        check_choice("timestep_spacing", self.timestep_spacing, ("leading", "trailing", "linspace"))
        if float(self.alphas_cumprod[-1]) <= 0 and self.prediction_type in ("epsilon", "score"):
            raise ValueError(
                f"prediction_type {self.prediction_type!r} says nothing about x_0 where alpha = 0, as at the last time of this"
                " schedule (zero terminal SNR); expected v_prediction or sample"
            )

    @cached_property
    def scheduler(self) -> DDPMScheduler:
        return DDPMScheduler(
            num_train_timesteps=self.num_train_timesteps,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            beta_schedule=self.beta_schedule,
            trained_betas=None if self.trained_betas is None else list(self.trained_betas),
            timestep_spacing=self.timestep_spacing,
            steps_offset=self.steps_offset,
            rescale_betas_zero_snr=self.rescale_betas_zero_snr,
        )

    def config(self):
        options = asdict(self)
        clip = options.pop("clip_sample")
        clipping = {"clip_sample": clip is not None} | ({} if clip is None else {"clip_sample_range": clip})
        return {"_class_name": "DDPMScheduler", **options, **clipping, "thresholding": False}

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        return self.scheduler.alphas_cumprod.double()

    @cached_property
    def _angles(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def angles(self) -> Tensor:
        return torch.atan2((1 - self.alphas_cumprod).clamp_min(0).sqrt(), self.alphas_cumprod.clamp_min(0).sqrt())

    def angles_on(self, device: torch.device) -> Tensor:
        """Kept on each device: a GPU would wait for a copy."""
        if device not in self._angles:
            self._angles[device] = self.angles.to(device)
        return self._angles[device]

    def alpha_sigma(self, t):
        angles, position = self.angles_on(t.device), t.double().clamp(0, self.num_train_timesteps - 1)
        low = position.long().clamp_max(self.num_train_timesteps - 2) if self.num_train_timesteps > 1 else position.long()
        high = (low + 1).clamp_max(self.num_train_timesteps - 1)
        angle = torch.lerp(rows(angles, low), rows(angles, high), position - low).where(t >= 0, torch.zeros_like(position))
        return angle.cos(), angle.sin()

    def times(self, steps):
        check_count("steps", steps)
        last = self.num_train_timesteps - 1
        if steps <= self.num_train_timesteps:
            self.scheduler.set_timesteps(steps)
            grid = self.scheduler.timesteps.double()
            grid = grid[grid >= 0]  # "trailing" rounds to one time too many at some K, such as 61 of 1000
            grid = grid - (grid[0] - last).clamp_min(0)  # steps_offset must not push the first time over the end
        else:
            grid = torch.linspace(last, 0, steps, dtype=torch.float64)
        return torch.cat([grid, grid.new_tensor([CLEAN])])


@dataclass(frozen=True)
class VarianceExploding(Schedule):
    """x_t = x_0 + sigma_t n with sigma_t = sigma_min (sigma_max / sigma_min)^t for t in [0, 1]; the network is told sigma_t
    (diffusers' ScoreSdeVe; Song et al. 2021, arXiv 2011.13456)."""

    sigma_min: float = 0.01
    sigma_max: float = 1348.0
    prediction_type: str = "score"
    clip_sample: float | None = None

    def __post_init__(self):
        require_prediction_type(self)
        check_positive("sigma_min", self.sigma_min)
        if not self.sigma_max > self.sigma_min:
            raise ValueError(f"sigma_max must be above sigma_min = {self.sigma_min}, got {self.sigma_max!r}")

    def alpha_sigma(self, t):
        t = t.double()
        sigma = self.sigma_min * (self.sigma_max / self.sigma_min) ** t.clamp_min(0)
        return torch.ones_like(t), sigma.where(t >= 0, torch.zeros_like(t))

    def times(self, steps):
        check_count("steps", steps)
        grid = torch.linspace(1, 0, steps, dtype=torch.float64)
        return torch.cat([grid, grid.new_tensor([CLEAN])])

    def network_time(self, t):
        return self.alpha_sigma(t)[1]

    def config(self):
        return {"_class_name": "ScoreSdeVeScheduler", **asdict(self)}


@dataclass(frozen=True)
class FlowMatching(Schedule):
    """The linear interpolant x_t = (1 - t) x_0 + t n for t in [0, 1] (Lipman et al. 2023, arXiv 2210.02747). The network is told
    num_train_timesteps * t; `shift` crowds the grid towards the noisy end, as in diffusers' FlowMatchEulerDiscreteScheduler."""

    shift: float = 1.0
    num_train_timesteps: int = 1000
    prediction_type: str = "flow_prediction"
    clip_sample: float | None = None

    def __post_init__(self):
        require_prediction_type(self)
        check_positive("shift", self.shift)
        if self.prediction_type in ("epsilon", "score"):
            raise ValueError(
                f"prediction_type {self.prediction_type!r} says nothing about x_0 at t = 1; expected flow_prediction or sample"
            )

    def alpha_sigma(self, t):
        t = t.double().clamp(0, 1)
        return 1 - t, t

    def times(self, steps):
        check_count("steps", steps)
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
        grid = self.shift * grid / (1 + (self.shift - 1) * grid)
        return torch.cat([grid, grid.new_tensor([CLEAN])])

    def network_time(self, t):
        return self.num_train_timesteps * t

    def config(self):
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", **asdict(self)}


def schedule_from_config(config: Mapping[str, Any] | SchedulerMixin) -> Schedule:
    """The schedule that a diffusers scheduler's config describes.

    Args:
        config: a diffusers scheduler, or the content of a `scheduler_config.json`. (The `config` of a scheduler that was not loaded
            from a file does not say its class.)

    Raises:
        ValueError: an unknown scheduler class, beta schedule, prediction type or spacing; dynamic thresholding, whose quantiles
            couple the elements of the estimate of x_0 and so have no Gaussian step.
    """
    if not isinstance(config, SchedulerMixin | Mapping):
        raise TypeError(f"scheduler must be a diffusers scheduler or its config, got {config!r}")
    if isinstance(config, SchedulerMixin):
        config = {**config.config, "_class_name": type(config).__name__}
    name = str(config.get("_class_name"))
    if name == "ScoreSdeVeScheduler":
        return VarianceExploding(
            config["sigma_min"], config["sigma_max"], config.get("prediction_type", "score"), config.get("clip_sample")
        )
    if name == "FlowMatchEulerDiscreteScheduler":
        prediction_type = config.get("prediction_type", "flow_prediction")
        return FlowMatching(config.get("shift", 1.0), config.get("num_train_timesteps", 1000), prediction_type, config.get("clip_sample"))
    check_choice("scheduler", name, (*VARIANCE_PRESERVING, "ScoreSdeVeScheduler", "FlowMatchEulerDiscreteScheduler"))
    if config.get("thresholding"):
        raise ValueError(
            "thresholding must be false, got true: dynamic thresholding has no Gaussian step density; expected clip_sample or none"
        )
    if config.get("use_flow_sigmas"):
        raise ValueError(
            "use_flow_sigmas must be false, got true: expected the config of a FlowMatchEulerDiscreteScheduler for such a model"
        )
    betas = config.get("trained_betas")
    # A config that does not mention clip_sample means the default of its scheduler: DDPM and DDIM clip, the others do not know it.
    clips = config.get("clip_sample", name.startswith(("DDPM", "DDIM")))
    return VariancePreserving(
        num_train_timesteps=config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 1e-4),
        beta_end=config.get("beta_end", 0.02),
        beta_schedule=config.get("beta_schedule", "linear"),
        trained_betas=None if betas is None else tuple(float(b) for b in betas),
        timestep_spacing=config.get("timestep_spacing", "leading"),
        steps_offset=config.get("steps_offset", 0),
        rescale_betas_zero_snr=config.get("rescale_betas_zero_snr", False),
        prediction_type=config.get("prediction_type", "epsilon"),
        clip_sample=config.get("clip_sample_range", 1.0) if clips else None,
    )
