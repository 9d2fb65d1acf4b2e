r"""Networks of the posterior: a conditional copy of the prior's, or a small residual perceptron beside a prior that has none.

`network.estimate(prior, x_t, t)` gives a first estimate of x_0 that needs no trained network, and its error r^2; the data residual seen
from there, `move`, is where the observation would move it, in units of r. `network(prior, x_t, t, condition, move, x_0)` gives the
trained estimate of x_0 and the log-scale of the step's standard deviations, (*batch, *shape) each. `condition` is what
`InverseProblem.condition` makes of y. Everything added to the prior starts at zero.
"""

import copy
from typing import Any

import torch
from diffusers import UNet1DModel, UNet2DModel
from torch import Tensor, nn

from rtb_inverse.chains import Prior
from rtb_inverse.guidance.base import product_by_time
from rtb_inverse.schedules import expand

AT_ONCE = 2**18  # elements of states in one call of a network: some 300 MB for a small U-Net, and no slower than more
RANK = 256  # of the directions in which a head corrects estimates


def outputs(network: nn.Module, x: Tensor, time: Tensor) -> Tensor:
    """Of a diffusers network on states (M, *size) at times (M,): without gradients at most `AT_ONCE` elements at a time, which bounds the
    memory, however many."""
    most = len(x) if torch.is_grad_enabled() else max(1, AT_ONCE // x.shape[1:].numel())
    return torch.cat([network(*part).sample for part in zip(x.split(most), time.split(most), strict=True)])


def zero(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero; returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class WiderInput(nn.Module):
    """A convolution that reads `extra` more channels, inserted behind the first `channels`; it starts deaf to them, bit for bit."""

    def __init__(self, conv: nn.Module, channels: int, extra: int):
        super().__init__()
        self.conv, self.channels, self.extra = conv, channels, extra
        self.added = zero(type(conv)(extra, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=False))

    def forward(self, x):
        first, extra, rest = x.tensor_split((self.channels, self.channels + self.extra), dim=1)
        return self.conv(torch.cat([first, rest], 1) if rest.shape[1] else first) + self.added(extra)


class WiderOutput(nn.Module):
    """A convolution that gives `extra` more channels, behind its own; they start at zero."""

    def __init__(self, conv: nn.Module, extra: int):
        super().__init__()
        self.conv = conv
        self.added = zero(type(conv)(conv.in_channels, extra, conv.kernel_size, conv.stride, conv.padding))

    def forward(self, x):
        return torch.cat([self.conv(x), self.added(x)], 1)


class ConditionalUNet(nn.Module):
    """A trainable copy of a diffusers UNet that also reads condition and move, and also says a log-scale (UNet2DModel).

    Its x_t is moved by input_gate_t alpha_t r move, towards what the observation makes of it: with a gate of 1 the seen elements
    arrive as clean as y makes them. The gates, one per step, start at 0 (`Posterior` opens them for a guided start).

    Args:
        prior: a prior with `network` and `predict`.
        condition_channels: C of `condition`.
        lora_rank: where given, only low-rank adapters of attention and convolution weights (peft) and the added inputs are trained.
    """

    def __init__(self, prior: Prior, condition_channels: int, lora_rank: int | None = None):
        super().__init__()
        self.channels = prior.shape[0]
        self.extra = condition_channels + self.channels
        network: Any = copy.deepcopy(prior.network).requires_grad_(lora_rank is None)
        if lora_rank is not None:
            network = add_lora(network, lora_rank)
        self.two_dimensional = isinstance(network, UNet2DModel)
        if self.two_dimensional:
            network.conv_in = WiderInput(network.conv_in, self.channels, self.extra)
            network.conv_out = WiderOutput(network.conv_out, self.channels)
        elif isinstance(network, UNet1DModel):
            first = network.down_blocks[0].resnets[0]
            first.conv_1 = WiderInput(first.conv_1, self.channels, self.extra)
            if first.has_conv_skip:
                first.conv_skip = WiderInput(first.conv_skip, self.channels, self.extra)
        else:
            raise TypeError(
                f"prior.network must be a UNet2DModel or a UNet1DModel, got {type(network).__name__}; pass Posterior(network=...)"
            )
        self.network = network
        self.input_gate = nn.Parameter(torch.zeros(prior.steps))

    def train(self, mode: bool = True):
        return super().train(False)  # dropout would make the density random

    def estimate(self, prior: Prior, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """As if x_0 ~ N(0, I)."""
        return gaussian_estimate(prior, x_t, t)

    def forward(
        self, prior: Prior, x_t: Tensor, t: Tensor, condition: Tensor, move: Tensor | None, x_0: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        move = torch.zeros_like(x_t) if move is None else move
        axis = -len(prior.shape)
        gate, alpha, r2 = self.input_gate[prior.step_index(t)], prior.schedule.alpha_sigma(t)[0], gaussian_error(prior, t)
        moved = x_t + expand(gate * alpha, x_t) * r2.sqrt().to(x_t.dtype) * move
        condition = on_grid(condition, prior.shape[1:])
        seen = torch.cat([moved, condition.to(x_t.dtype).expand(*x_t.shape[:axis], *condition.shape[1:]), move], axis)
        predict: Any = prior.predict
        output = predict(self.network, seen, t)
        output, log_scale = output.split(self.channels, axis) if self.two_dimensional else (output, 0.0)
        return prior.schedule.to_x_0(output, x_t, t), log_scale


def on_grid(condition: Tensor, spatial: torch.Size) -> Tensor:
    """(B, C, *spatial) as it is; of a grid n times finer along an axis, blocks of n positions become channels: (B, n C, *spatial). So the
    network of a latent chain sees all of what is known on the grid of the pixels.

    Raises:
        ValueError: a grid that is no multiple.
    """
    was = condition.shape[2:]
    if was == spatial:
        return condition
    if len(was) != len(spatial) or any(fine % coarse for fine, coarse in zip(was, spatial, strict=True)):
        raise ValueError(f"condition must lie on x's grid {tuple(spatial)} or a multiple of it, got {tuple(was)}")
    for axis, coarse in enumerate(spatial, 2):
        condition = condition.unflatten(axis, (coarse, -1)).movedim(axis + 1, 2).flatten(1, 2)
    return condition


def gaussian_error(prior: Prior, t: Tensor) -> Tensor:
    """Var[x_0 | x_t] if x_0 were N(0, I), (*t.shape, *shape), float64."""
    alpha, sigma = (c.reshape(c.shape + (1,) * len(prior.shape)) for c in prior.schedule.alpha_sigma(t))
    return (sigma**2 / (alpha**2 + sigma**2)).expand(t.shape + prior.shape)


def gaussian_estimate(prior: Prior, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """E[x_0 | x_t] and its variance (float64) if x_0 were N(0, I)."""
    alpha, sigma = prior.schedule.alpha_sigma(t)
    return expand(alpha / (alpha**2 + sigma**2), x_t) * x_t, gaussian_error(prior, t)


def add_lora(network: nn.Module, rank: int) -> nn.Module:
    """Low-rank adapters on every linear layer and convolution of a frozen network; first and last convolutions stay as they are."""
    from peft import LoraConfig, inject_adapter_in_model

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d)
    names = [n for n, m in network.named_modules() if isinstance(m, kinds) and not n.startswith(("conv_in", "conv_out", "time_"))]
    if isinstance(network, UNet1DModel):
        names = [n for n in names if not n.startswith("down_blocks.0.resnets.0.")]
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=names), network)


def fourier(x: Tensor, octaves: int = 3) -> Tensor:
    """x and the sine and cosine of 2^k x, k < octaves, along the last axis."""
    waves = x[..., None] * 2.0 ** torch.arange(octaves, device=x.device, dtype=x.dtype)
    return torch.cat([x, waves.sin().flatten(-2), waves.cos().flatten(-2)], -1)


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, h):
        return h + self.layers(h)


class ResidualMLP(nn.Module):
    """For a prior without a network: x0hat = prior.denoise(x_t, t) + r_t f, where f sees Fourier features of x_t, of that estimate, of the
    same estimate moved by the data, and of y, each flattened and scaled by its own spread.

    Args:
        d: number of elements of x. m: of the condition.
        x_mean, x_std, y_mean, y_std: means and spreads, (d,) and (m,).
    """

    x_mean: Tensor
    x_std: Tensor
    y_mean: Tensor
    y_std: Tensor

    def __init__(self, x_mean: Tensor, x_std: Tensor, y_mean: Tensor, y_std: Tensor, width: int = 256, blocks: int = 2, octaves: int = 3):
        super().__init__()
        d, m = len(x_mean), len(y_mean)
        self.octaves, self.d = octaves, d
        for name, value in {"x_mean": x_mean, "x_std": x_std, "y_mean": y_mean, "y_std": y_std}.items():
            self.register_buffer(name, value)
        features = (3 * d + m) * (2 * octaves + 1) + d + 16
        self.first = nn.Linear(features, width)
        self.norm = nn.LayerNorm(width)  # without it long trainings go astray
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
        self.last = zero(nn.Linear(width, 2 * d))

    def estimate(self, prior: Prior, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The prior's own, which costs no network."""
        error = prior.denoiser_error(t)
        return prior.denoise(x_t, t), gaussian_error(prior, t) if error is None else error

    def forward(self, prior: Prior, x_t: Tensor, t: Tensor, condition: Tensor, move: Tensor | None, x_0: Tensor) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled() and not any(p.any() for p in self.last.parameters()):
            return x_0, torch.zeros_like(x_0)  # not trained: f = 0
        shape, event_dim = x_t.shape, len(prior.shape)
        x_t, x_0 = x_t.flatten(-event_dim), x_0.flatten(-event_dim)
        move = torch.zeros_like(x_t) if move is None else move.flatten(-event_dim)
        alpha, sigma = (c.to(x_t.device, x_t.dtype).expand(x_t.shape[:-1])[..., None] for c in prior.schedule.alpha_sigma(t))
        error = prior.denoiser_error(t)
        r = sigma / (alpha**2 + sigma**2).sqrt() if error is None else error.flatten(-event_dim).sqrt().to(x_t.device, x_t.dtype)
        y = (condition.flatten(1) - self.y_mean) / self.y_std
        scaled = (x_t - alpha * self.x_mean) / (alpha**2 * self.x_std**2 + sigma**2).sqrt()
        estimates = [scaled, (x_0 - self.x_mean) / self.x_std, (x_0 + r * move - self.x_mean) / self.x_std]
        estimates.append(y.expand(*x_t.shape[:-1], y.shape[-1]))
        log_snr = (sigma / alpha.clamp_min(1e-6)).log() / 4
        time = torch.cat([(log_snr * f).sin() for f in (0.25, 0.5, 1, 2)] * 2 + [(log_snr * f).cos() for f in (0.25, 0.5, 1, 2)] * 2, -1)
        features = [fourier(e, self.octaves) for e in estimates] + [move / (1 + move.abs()), time]
        h = self.norm(self.first(torch.cat(features, -1)))
        shift, log_scale = self.last(nn.functional.silu(self.blocks(h))).chunk(2, -1)
        return (x_0 + r * shift).reshape(shape), log_scale.reshape(shape)


class LinearHead(nn.Module):
    r"""For one y: at each step a linear map of what is known there is added to the estimate of x_0,

        x0hat + U W_k^T (1, U^T x_t / sqrt(alpha_t^2 + sigma_t^2), U^T x0hat),

    of x of more than `RANK` elements in the orthonormal directions U in which the draws for that y vary most; of others U = I.
    Starts at 0; `training.fit_head` finds it.
    """

    basis: Tensor  # U, (d, r)
    weight: Tensor  # W_k, the last step first, (K, 1 + 2 r, r)

    def __init__(self, prior: Prior):
        super().__init__()
        d, r = prior.shape.numel(), min(prior.shape.numel(), RANK)
        self.schedule, self.event_dim = prior.schedule, len(prior.shape)
        self.register_buffer("basis", torch.eye(d, r, **prior._options()))
        self.register_buffer("weight", torch.zeros((prior.steps, 1 + 2 * r, r), **prior._options()))

    def features(self, x_t: Tensor, t: Tensor, x_0: Tensor) -> Tensor:
        """What is known at states x_t (*batch, *shape), t and the estimates x_0 there: (*batch, 1 + 2 r)."""
        scaled = x_t / expand(torch.hypot(*self.schedule.alpha_sigma(t)), x_t)
        return nn.functional.pad(torch.cat([self.within(scaled), self.within(x_0)], -1), (1, 0), value=1.0)

    def within(self, x: Tensor) -> Tensor:
        """The coordinates of x (*batch, *shape) in the directions, (*batch, r)."""
        return x.flatten(-self.event_dim) @ self.basis

    def forward(self, x_t: Tensor, t: Tensor, k: Tensor, x_0: Tensor) -> Tensor:
        """The estimate x_0 (*batch, *shape) at steps k, corrected; t and k broadcast to the batch."""
        steps, which = k.unique(return_inverse=True)
        known = self.features(x_t, t, x_0)
        correction = product_by_time(known, [self.weight[i].T for i in steps], which.expand(known.shape[:-1]))
        return x_0 + (correction @ self.basis.T).reshape(x_0.shape)


class LogZ(nn.Module):
    """log Z(y): a perceptron of the condition, or one number where there is no observation. Starts at zero."""

    def __init__(self, features: int, width: int = 128):
        super().__init__()
        self.features, self.bias = features, nn.Parameter(torch.zeros(()))
        self.pool = nn.AdaptiveAvgPool1d(min(features, 1024)) if features > 1024 else nn.Identity()
        self.layers = None
        if features:
            first = nn.Linear(min(features, 1024), width)
            self.layers = nn.Sequential(first, nn.SiLU(), nn.Linear(width, width), nn.SiLU(), zero(nn.Linear(width, 1)))

    @property
    def learned(self) -> bool:
        """Whether training has moved it from zero."""
        last = [] if self.layers is None else list(self.layers[-1].parameters())
        return any(bool((parameter != 0).any()) for parameter in (self.bias, *last))

    def forward(self, condition: Tensor | None) -> Tensor:
        """(B, ...) to (B,); None to (1,)."""
        if self.layers is None or condition is None:
            return self.bias[None]
        if (seen := condition[0].numel()) != self.features:
            hint = "posterior.log_evidence(y) takes y itself"
            raise ValueError(f"condition must be what the network sees of y, {self.features} numbers each, got {seen}; {hint}")
        return self.bias + self.layers(self.pool(condition.flatten(1)))[:, 0]
