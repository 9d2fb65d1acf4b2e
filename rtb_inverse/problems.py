r"""Measurement models y = A(x) + noise, as normalised likelihoods p(y | x), so that Z(y) = int p(x) p(y | x) dx is the evidence."""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from rtb_inverse.checks import check_finite, check_tensor
from rtb_inverse.noise import GaussianNoise, Noise, noise_from_config
from rtb_inverse.particles import check_below_infinity
from rtb_inverse.randomness import check_generator, fixed_normal

BEYOND = 10  # standard deviations of Gaussian noise, beyond which a y is a mistake (of its units, say)
FAR = 30  # times what draws of the prior give and noise adds: beyond, y may be in other units
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
TRIED = 3  # x that an operator is tried on
POINTS = 8  # where the Jacobian of an operator that is not affine is taken, for `condition`

__all__ = ["GaussianNoise", "InverseProblem", "MatrixOperator", "Reward"]


class MatrixOperator(nn.Module):
    """A(x) = A vec(x), for a matrix A of shape (m, d)."""

    matrix: Tensor

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.to(x.dtype).T


@contextmanager
def full_products() -> Iterator[None]:
    """Within it a GPU's convolutions and matrix products are those of float32, not of TF32."""
    if not hasattr(torch.backends.cudnn, "conv"):  # torch below 2.9
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
        return
    parts: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]
    was = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, precision in zip(parts, was, strict=True):
            part.fp32_precision = precision


class InverseProblem(nn.Module):
    """p(y | x) by an operator A and a noise model.

    Args:
        operator: any callable from a batch of x, (M, *shape), to a batch of clean measurements, (M, *y_shape); or a matrix (m, d). None
            for a subclass that overrides `forward`, on (*batch, *shape), and so is its own.
        noise: a noise model, `GaussianNoise(std)` or another of `rtb_inverse.noise`; or a module of your own with `sample` and `log_prob`.
        shape: shape of one x. May be left out: `Posterior` tells it the prior's.
        linear: whether A is affine in x; tried out where it is not said, on a few x of the prior.

    Attributes:
        shape, y_shape: shapes of one x and one y; known once `shape` is.
        config: what `from_config` needs, beside the buffers, to rebuild the problem (JSON); None where only code can.
        mask: for operators that pick elements of x, the boolean mask of `shape` they pick; else None.
        y_range: for bounded operators under Gaussian noise, the least and the largest value that A(x) can have; else None.
        smoothed: for problems that see each element of x by itself, the logarithm of int N(x; mean, variance) p(y | x) dx, element by
            element: a function of mean, y (B, *shape) and variance, which broadcast to (*batch, *shape); else None. For a `NoiseRange`
            it takes the noise level of each y as well.
        condition_level: the noise that `condition` reckons with, as a multiple of that of the problem: other than 1 inside a `NoiseRange`.
    """

    operator: Any  # called with a batch of x
    noise: Any  # a module with sample(clean, generator) and log_prob(clean, y, event_dim); see `noise.Noise` for what else it may know
    mask: Tensor | None
    config: dict | None = None
    condition_level = 1.0
    y_range: tuple[float, float] | None = None
    smoothed: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    _check_clean = staticmethod(check_finite)
    _called = "operator"

    def __init__(
        self, operator: nn.Module | Callable[[Tensor], Tensor] | Tensor | None, noise: nn.Module, shape=None, linear: bool | None = None
    ):  # fmt: skip
        super().__init__()
        own = type(self).forward is not InverseProblem.forward
        if not isinstance(operator, Tensor) and not callable(operator) and not (own and operator is None):
            raise TypeError(f"operator must be a callable or a matrix, got {type(operator).__name__}")
        if isinstance(operator, Tensor) and (operator.ndim != 2 or not operator.is_floating_point()):
            hint = "; torch.view_as_real makes a real one" if operator.is_complex() else ""
            raise TypeError(f"operator must be a real matrix (m, d), got {operator.dtype} of shape {tuple(operator.shape)}{hint}")
        if not isinstance(noise, nn.Module):
            raise TypeError(f"noise must be a noise model such as GaussianNoise(std), got {noise!r}")
        self.operator = MatrixOperator(operator) if isinstance(operator, Tensor) else operator
        self.noise = noise
        self.register_buffer("mask", None)
        self.linear, self._tried = linear, linear is None  # whether `linear` was tried out, not said
        self.differentiable, self.tried_in = True, torch.get_default_dtype()
        self.shape: torch.Size | None = None
        self.y_shape: torch.Size | None = None
        self._reach: float | None = None  # of what the operator makes of draws of the prior, once known
        self._units: tuple[float, float] | None = None  # shift and scale of what `condition` shows, once known
        if isinstance(operator, Tensor) and isinstance(noise, Noise) and noise.config is not None:
            self.config = {"noise": noise.config}
        if shape is not None:
            self.bind(shape)

    @classmethod
    def from_config(cls, config: dict, weights: dict[str, Tensor]) -> "InverseProblem":
        """Rebuild a matrix problem from its `config` and saved buffers."""
        held = {name.removeprefix("noise."): value for name, value in weights.items() if name.startswith("noise.")}
        return cls(weights["operator.matrix"], noise_from_config(config["noise"], held))

    def bind(self, shape, x: Tensor | None = None) -> "InverseProblem":
        """Fix the shape of x, and try the operator on a few x of that shape. Returns itself, which moves in place to where given x lie,
        and its operator with it.

        Args:
            x: where the prior lives, and in its dtype, (M, *shape), M at least 2; by default x ~ N(0, I).

        Raises:
            ValueError: the shape differs from one given before; the operator drops or changes the batch, or returns non-finite values.
        """
        shape = torch.Size(shape)
        if self.shape is not None and self.shape != shape:
            raise ValueError(
                f"problem is for x of shape {tuple(self.shape)}, but the prior draws x of shape {tuple(shape)}; they must agree"
            )
        if x is not None:
            self.to(x.device)
        if self.shape is None:
            self._probe(shape, x)
            self.shape = shape
        elif x is not None and self._tried:  # before, perhaps where the prior does not live
            was, self.linear = self.linear, None
            self._probe(shape, x)
            self.linear = was and self.linear
        elif x is not None and isinstance(self.noise, GaussianNoise):
            with torch.no_grad():
                self._reach = float(self._measured(x).abs().max())
        return self

    def _probe(self, shape: torch.Size, examples: Tensor | None = None) -> None:
        """Try the operator on examples, by default x ~ N(0, I)."""
        normal = examples is None
        if examples is None:
            x = fixed_normal(0, (TRIED, *shape))
            x = x.to(next((tensor.device for tensor in (*self.buffers(), *self.parameters())), x.device))
        else:
            x = examples.detach().clone()
        self.tried_in = x.dtype
        with torch.enable_grad():
            x.requires_grad_()
            try:
                clean = self._measured(x)
            except Exception as error:
                raise ValueError(
                    f"{self._called} failed on x of shape {tuple(x.shape)}: {type(error).__name__}: {error} ({self.tried_in} on {x.device})"
                ) from error
            self._check_batch(x, clean)
            if not clean.is_floating_point():
                hint = "; torch.view_as_real makes one" if clean.is_complex() else ""
                raise TypeError(f"{self._called} must return a floating-point tensor, got {clean.dtype}{hint}")
            self._check_clean(f"{self._called}'s output" + " at x ~ N(0, I)" * normal, clean)
            self.differentiable = clean.requires_grad
        x, clean = x.detach(), clean.detach()
        self._reach = None if normal else float(clean.abs().max())
        self._check_alone(x, clean)
        if self.linear is None:
            self.linear = self._affine(x)
        if isinstance(self.noise, Noise):
            self.noise.check_shape(clean.shape[1:])
        self.y_shape = clean.shape[1:]

    def _measured(self, x: Tensor) -> Tensor:
        """A of a batch (M, *shape), as it comes."""
        return self.operator(x) if type(self).forward is InverseProblem.forward else self(x)

    def _check_batch(self, x: Tensor, clean: Any) -> Tensor:
        """`clean` if it is a tensor with the batch of x."""
        if not isinstance(clean, Tensor) or clean.ndim < 1 or len(clean) != len(x):
            was = tuple(clean.shape) if isinstance(clean, Tensor) else type(clean).__name__
            on = f"x of shape {tuple(x.shape)}"
            raise ValueError(f"{self._called} must map a batch (M, *shape) to a batch (M, *y_shape): on {on} it gave {was}")
        return clean

    @torch.no_grad()
    def _affine(self, x: Tensor) -> bool:
        """Whether A(u) + A(v) = A(u + d) + A(v - d), output by output, for u, v, d of the spread of the x (M, *shape); not where that is
        NaN, or A refuses such x. A GPU's convolutions round to three digits (TF32) unless told not to."""
        spread = (x - x.mean(0)).square().mean().sqrt()
        noise = fixed_normal(1, x.shape, x.dtype).to(x.device)
        u = torch.cat([x, x + spread * noise])
        v, d = u.roll(1, 0), u.roll(2, 0) - u.roll(3, 0)
        try:
            with full_products():
                here, moved, back = self._measured(torch.cat([u, u + d, v - d])).chunk(3)
        except Exception as error:
            hint = "it is taken for one that is not affine; linear=True says that it is"
            warnings.warn(f"operator refused x about those of the prior ({type(error).__name__}: {error}): {hint}", stacklevel=2)
            return False
        off = (here + here.roll(1, 0) - moved - back).abs()
        rounding = 16 * torch.finfo(here.dtype).eps * here.abs().max()
        return bool((off <= 1e-4 * (here - here.mean(0)).abs().amax(0) + rounding).all())

    def _check_alone(self, x: Tensor, clean: Tensor) -> None:
        """That each element of a batch is seen by itself."""
        alone = [self._measured(one[None]).detach() for one in x]
        for one in alone:
            if one.shape != (1, *clean.shape[1:]):
                was = f"{tuple(clean.shape)} and {tuple(one.shape)}"
                raise ValueError(f"{self._called} must keep the batch: on {len(x)} and 1 elements it gave {was}")
        largest = float(clean.where(clean.isfinite(), 0.0).abs().max()) if clean.numel() else 0.0
        if not torch.allclose(torch.cat(alone), clean, rtol=1e-3, atol=1e-3 * largest + 1e-12):
            raise ValueError(
                f"{self._called} must see each element of a batch by itself, expected the same values of {len(x)} x together and of each "
                "alone, got others"
            )

    def forward(self, x: Tensor) -> Tensor:
        """A(x), without noise: (*batch, *shape) to (*batch, *y_shape)."""
        if x.is_complex():
            raise TypeError(f"x must be real, got {x.dtype}; images of two channels hold real and imaginary parts")
        if self.shape is None:
            return self._check_batch(x, self.operator(x))
        batch = x.shape[: max(0, x.ndim - len(self.shape))]
        if x.shape[len(batch) :] != self.shape:
            raise ValueError(f"x must have shape (*batch, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        clean = self.operator(x.reshape(-1, *self.shape))
        return clean.reshape(batch + clean.shape[1:])

    def simulate(self, x: Tensor, generator: Generator | None = None) -> Tensor:
        """A draw y ~ p(y | x) for each x of (*batch, *shape)."""
        check_generator(generator)
        return self.noise.sample(check_finite("operator's output", self(x)), generator)

    def log_likelihood(self, x: Tensor, y: Tensor) -> Tensor:
        """log p(y | x), normalised in y: x (*batch, *shape), y (B, *y_shape) broadcast to the batch; returns (*batch)."""
        return self.noise.log_prob(self(x), y, len(self._known_y_shape()))

    def _known_y_shape(self) -> torch.Size:
        if self.y_shape is None:
            raise ValueError("shape of x is not known yet; give InverseProblem(..., shape=...) or pass the problem to Posterior first")
        return self.y_shape

    def residual(self, x: Tensor, y: Tensor) -> Tensor | None:
        """y - E[y | x], of covariance 1 under p(y | x): x (*batch, *shape) to (*batch, *y_shape); None where the noise does not know it.
        Its gradient holds the covariance fixed."""
        if not isinstance(self.noise, Noise):
            return None
        clean = self(x)
        return self.noise.whiten(clean.detach(), y - self.noise.mean(clean))

    def noise_variance(self, y: Tensor | None) -> Tensor | None:
        """sigma^2, its mean over the elements of y, one number or one for each y (B,), float64; None where the noise is not Gaussian."""
        return self.noise.std.double().square().mean() if isinstance(self.noise, GaussianNoise) else None

    @property
    def whitens(self) -> bool:
        """Whether the `residual` is known."""
        return isinstance(self.noise, Noise) or type(self).residual is not InverseProblem.residual

    def check_y(self, y: Tensor) -> Tensor:
        """y if it is a finite batch (B, *y_shape) that operator and noise model can give, floating-point, or whole numbers where it is to
        be whole; one clear error otherwise, and a warning where y is far beyond what the operator makes of draws of the prior."""
        y = check_tensor("y", self._as_floats(y), self.y_shape)
        if not isinstance(self.noise, Noise):
            return y
        y = self._check_range(self.noise.check(y))
        if isinstance(self.noise, GaussianNoise) and self._reach is not None:
            furthest, usual = float(y.abs().max()), self._reach + BEYOND * float(self.noise.std.max())
            if furthest > FAR * usual:
                warnings.warn(f"y is up to {furthest:.3g}, draws of the prior give up to {usual:.3g}: is y in their units?", stacklevel=3)
        return y

    def _as_floats(self, y: Tensor) -> Tensor:
        """Whole numbers as floats where the noise gives such."""
        whole = isinstance(self.noise, Noise) and self.noise.whole and isinstance(y, Tensor) and y.dtype in WHOLE
        return y.to(torch.get_default_dtype()) if whole else y

    def _check_range(self, y: Tensor, level: Tensor | float = 1.0) -> Tensor:
        """y if it lies no more than `BEYOND` standard deviations, `level` times those of the noise, outside of `y_range`."""
        if self.y_range is not None:
            (low, high), reach = self.y_range, BEYOND * level * self.noise.std.to(y.device)
            bad = (y < low - reach) | (y > high + reach)
            if bad.any():
                expected = f"what the operator gives, [{low:g}, {high:g}], and no more than {BEYOND} noise_std beyond"
                raise ValueError(f"y must be within {expected}, got {float(y[bad][0]):.6g} ({int(bad.sum())} such elements)")
        return y

    def condition(self, y: Tensor) -> Tensor:
        """What the posterior network sees of y, (B, *y_shape) to (B, C, *spatial) for x of shape (c, *spatial), (B, m) for x of shape (d,).

        By default y itself where x is a vector or y lies on x's grid, else its back-projection J^T y, J the operator's Jacobian. Where A
        is not affine, J is the mean over a few fixed x ~ N(0, I) (at 0 that of an even A, such as |F x|, is 0). Where A is not affine or
        the noise not Gaussian, y may have any units: then what is shown for E[y | x] at these x is shifted and scaled to mean 0 and mean
        square 1.
        """
        self._known_y_shape()
        if len(self.shape) == 1:  # type: ignore[arg-type]
            return y.reshape(len(y), -1)
        if self.linear and isinstance(self.noise, GaussianNoise):
            return self._shown(y)
        if self._units is None:
            clean = self(self._points().to(y)).detach()
            known = check_finite(
                "what `condition` shows of y", self._shown(self.noise.mean(clean) if isinstance(self.noise, Noise) else clean)
            )
            self._units = float(known.mean()), float(known.std(correction=0)) or 1.0
        shift, scale = self._units
        return (self._shown(y) - shift) / scale

    def picture(self, y: Tensor) -> Tensor:
        """y as images to look at, (B, 1 or 3, h, w), NaN where nothing was seen: itself where it is one, else what the network sees."""
        return y if y.ndim == 4 and y.shape[1] in (1, 3) else self.condition(y)

    def at_condition_level(self, level: float) -> "InverseProblem":
        """The same problem, operator and noise shared, but for its `condition_level`."""
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        other.condition_level = level
        return other

    def _points(self) -> Tensor:
        """A few fixed x ~ N(0, I)."""
        return fixed_normal(0, (POINTS, *self.shape))

    def _shown(self, y: Tensor) -> Tensor:
        """y, or its back-projection, in the units of y."""
        if len(self.y_shape) == len(self.shape) and self.y_shape[1:] == self.shape[1:]:
            return y
        if not self.differentiable:
            raise ValueError(
                "operator is not differentiable and y is not on x's grid: override `condition` to say what the network sees of y"
            )
        with torch.inference_mode(False), torch.enable_grad():
            points = (torch.zeros((1, *self.shape)) if self.linear else self._points()).to(y)
            x = points.repeat_interleave(len(y), 0).requires_grad_()
            projected = torch.autograd.grad(self._measured(x), x, y.repeat(len(points), *(1,) * (y.ndim - 1)))[0]
        return projected.detach().reshape(len(points), len(y), *self.shape).mean(0)


class Reward(InverseProblem):
    """A posterior p(x) exp(r(x)) / Z without any observation.

    Args:
        log_reward: callable from (M, *shape) to (M,), r(x); -inf, for an x that is never to be drawn, is for the corrections only.
        shape: shape of one x.
    """

    _check_clean = staticmethod(check_below_infinity)
    _called = "log_reward"

    def __init__(self, log_reward: nn.Module | Callable[[Tensor], Tensor], shape=None):
        super().__init__(log_reward, nn.Identity(), shape, linear=False)

    def _probe(self, shape, examples=None):
        super()._probe(shape, examples)
        if self.y_shape:
            raise ValueError(f"log_reward must give one number per x: on a batch of 3 it gave shape {(3, *self.y_shape)}, expected (3,)")

    def log_likelihood(self, x, y=None):
        return self(x)

    def simulate(self, x, generator=None):
        raise TypeError("a Reward has no observation to simulate")

    def check_y(self, y):
        if y is not None:
            raise ValueError(f"y must be None for a Reward, got {type(y).__name__}")
        return y
