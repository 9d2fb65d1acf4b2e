r"""Any generator x = f(z) of Gaussian noise as the prior: a VAE's decoder, a GAN, a flow.

The chain is that of z ~ N(0, I), which is exact: x_t ~ N(0, (alpha_t^2 + sigma_t^2) I), with the mean and the variance

    E[z | x_t] = alpha_t x_t / (alpha_t^2 + sigma_t^2),      Var[z | x_t] = sigma_t^2 / (alpha_t^2 + sigma_t^2).

With `decode = f` a posterior in z is one in x ("outsourced diffusion sampling",
Venkatraman et al. 2025, arXiv 2502.06999); nothing else differs from a prior of x itself.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from priors.mixture import default_schedule
from rtb_inverse.chains import Prior
from rtb_inverse.checks import check_count
from rtb_inverse.distributions import GaussianStep
from rtb_inverse.networks import gaussian_error, gaussian_estimate
from rtb_inverse.randomness import fixed_normal, standard_normal
from rtb_inverse.schedules import Schedule


class GeneratorPrior(Prior):
    """x = f(z), z ~ N(0, I), as an exact chain in z.

    Args:
        generator: f, from (M, *shape) to (M, *data_shape); any callable on batches. A module is frozen, and in eval mode for ever;
            whatever a function calls, freeze yourself.
        shape: of one z.
        schedule: by default that of `GaussianMixturePrior`.
        steps: K.
        dtype, device: of z; by default those of a module's parameters.

    The generator is code: give it again where a saved posterior is loaded, `Posterior.from_pretrained(folder, prior=prior)`.

    Raises:
        TypeError: a generator that cannot be called, or returns no tensor.
        ValueError: a generator that does not take z of that shape, drops or mixes the batch, returns values that are not finite, or calls a
            network that is not frozen.
    """

    exact_reversal = white = True
    anchor: Tensor

    def __init__(
        self, generator: nn.Module | Callable[[Tensor], Tensor], shape, schedule: Schedule | None = None, steps: int = 40,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ):  # fmt: skip
        if not callable(generator):
            raise TypeError(f"generator must be callable, got {type(generator).__name__}")
        shape = (check_count("shape", shape),) if isinstance(shape, int) else tuple(check_count("shape", n) for n in shape)
        super().__init__(shape, default_schedule() if schedule is None else schedule, steps, min_std=1e-6)
        if isinstance(generator, nn.Module):
            generator.requires_grad_(False).eval()
        own = next((p for p in generator.parameters() if p.is_floating_point()), None) if isinstance(generator, nn.Module) else None
        like = torch.zeros(()) if own is None else own
        self.generator = generator
        self.register_buffer("anchor", torch.zeros((), dtype=dtype or like.dtype, device=device or like.device), persistent=False)
        self._data_shape = self._probe()

    def _options(self):
        return {"device": self.anchor.device, "dtype": self.anchor.dtype}

    @torch.enable_grad()
    def _probe(self) -> torch.Size:
        """The shape of one x."""
        z = fixed_normal(0, (2, *self.shape)).to(**self._options())
        try:
            x = self.generator(z)
        except Exception as error:
            shape = ", ".join(map(str, self.shape))
            raise ValueError(f"generator must take z of shape (M, {shape}), got {type(error).__name__}: {error}") from error
        if not isinstance(x, Tensor):
            raise TypeError(f"generator must return a tensor (M, *data_shape), got {type(x).__name__}")
        if x.ndim < 2 or len(x) != 2:
            raise ValueError(f"generator must keep the batch, (M, *data_shape) for M z's, got {tuple(x.shape)} for 2 of them")
        if not torch.isfinite(x).all():
            raise ValueError("generator must return finite values, got some that are not at z ~ N(0, I)")
        if x.requires_grad:
            raise ValueError(
                "generator must be frozen, got one whose x requires a gradient at a fixed z: call requires_grad_(False), eval()"
            )
        self._check_alone(z, x)
        return x.shape[1:]

    def _check_alone(self, z: Tensor, x: Tensor) -> None:
        """That each z is seen by itself."""
        hint = "call eval() on a network that it uses"
        try:
            alone = torch.cat([self.generator(one[None]) for one in z])
        except Exception as error:
            raise ValueError(f"generator must take any number of z, got {type(error).__name__} of one ({error}): {hint}") from error
        if not torch.allclose(alone, x, rtol=1e-3, atol=1e-3 * float(x.abs().max()) + 1e-12):
            raise ValueError(f"generator must see each z by itself, got other x of two z together than of each alone: {hint}")

    def train(self, mode: bool = True) -> "GeneratorPrior":
        return super().train(False)

    def decode(self, x_0):
        x = self.generator(x_0.reshape(-1, *self.shape))
        return x.reshape(*x_0.shape[: x_0.ndim - len(self.shape)], *x.shape[1:])

    @property
    def distribution(self) -> GaussianStep:
        """p(z) = N(0, I)."""
        return GaussianStep(torch.zeros(self.shape, **self._options()), self.anchor + 1, len(self.shape))

    def sample(self, n, generator=None, progress=False):
        """n draws of z (n, *shape), without the chain; `decode` makes x of them."""
        return standard_normal(self.anchor, generator, (n, *self.shape))

    def denoise(self, x_t, t):
        return gaussian_estimate(self, x_t, t.to(x_t.device))[0]

    def denoiser_error(self, t):
        return gaussian_error(self, t.to(self.anchor.device))
