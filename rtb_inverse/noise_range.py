r"""One measurement model for a range of noise levels: the level l of each observation is drawn log-uniformly, and told with it,

    y = (A(x) + l std n,  log l),      n ~ N(0, I),      log l ~ U(log low, log high).

p(y | x) is the density of the measurement at that level, p(A(x) + l std n | x, l). The level's own density, the same for all x, is no
part of it: so Z(y) is the evidence p(measurement | l), as it is of the same problem with the one level l.
"""

import torch
from torch import Generator, Tensor, nn

from rtb_inverse.checkpoints import class_path, own_class
from rtb_inverse.checks import check_finite, check_positive, check_tensor
from rtb_inverse.noise import GaussianNoise
from rtb_inverse.problems import InverseProblem
from rtb_inverse.randomness import uniform


class NoiseLevel(nn.Module):
    """l, log-uniform in [low, high]."""

    low: Tensor
    high: Tensor

    def __init__(self, low: float, high: float):
        super().__init__()
        if check_positive("low", low) >= check_positive("high", high):
            raise ValueError(f"high must be above low, got low {low!r} and high {high!r}")
        self.register_buffer("low", torch.tensor(low, dtype=torch.float64))
        self.register_buffer("high", torch.tensor(high, dtype=torch.float64))

    def share(self, log_level: Tensor) -> Tensor:
        """Where between log low (0) and log high (1) a log-level is."""
        return ((log_level - self.low.log()) / (self.high / self.low).log()).to(log_level.dtype)

    def sample_log(self, shape, like: Tensor, generator: Generator | None = None) -> Tensor:
        """log l, of `shape`, in the dtype of `like`."""
        share = uniform(shape, like, generator)
        return self.low.log().to(like) + share * (self.high / self.low).log().to(like)


class NoiseRange(InverseProblem):
    """A problem with Gaussian noise whose level varies: one posterior serves them all. y is the vector of the m elements of a measurement
    and its log-level, (B, m + 1); `observation` makes it.

    Args:
        problem: with `GaussianNoise(std)`; the noise of an observation is l std, so with std = 1 the level is the standard deviation.
        low, high: range of the level l, 0 < low < high.

    Raises:
        TypeError: a problem that is none, or has another noise. ValueError: a range that is none.
    """

    operator: InverseProblem
    noise: NoiseLevel

    def __init__(self, problem: InverseProblem, low: float, high: float):
        if not isinstance(problem, InverseProblem) or not isinstance(problem.noise, GaussianNoise):
            was = type(getattr(problem, "noise", problem)).__name__
            raise TypeError(f"problem must be an InverseProblem with GaussianNoise, got one of {was}")
        noise = NoiseLevel(low, high)
        problem = problem.at_condition_level((low * high) ** 0.5)
        super().__init__(problem, noise, problem.shape)
        if problem.smoothed is not None:
            self.smoothed = self._smoothed
        if problem.config is not None:
            self.config = {"low": low, "high": high, "problem": {"class_path": class_path(problem), "config": problem.config}}

    @classmethod
    def from_config(cls, config, weights):
        held = {name.removeprefix("operator."): value for name, value in weights.items() if name.startswith("operator.")}
        inner = own_class(config["problem"]["class_path"]).from_config(config["problem"]["config"], held)
        return cls(inner, config["low"], config["high"])

    def _probe(self, shape, examples=None):
        self.linear = self.operator.bind(shape, examples).linear
        super()._probe(shape, examples)
        self.y_shape = torch.Size([self.y_shape.numel() + 1])

    def observation(self, measurement: Tensor, level: float | Tensor) -> Tensor:
        """y (B, m + 1) of measurements (B, *measurement_shape) and their level l, a number or (B,).

        Raises:
            ValueError: a measurement that the problem refuses; a level out of range.
        """
        measurement = check_tensor("measurement", measurement, self.operator._known_y_shape()).to(self.noise.low.device)
        given, (low, high) = torch.as_tensor(level).to(measurement), (float(self.noise.low), float(self.noise.high))
        if given.shape not in ((), (len(measurement),)) or not bool((given > 0).all() & given.isfinite().all()):
            expected = f"a number in [{low:g}, {high:g}], or one for each of the {len(measurement)} measurements"
            raise ValueError(f"level must be {expected}, got {level!r}")
        return self.check_y(self._join(measurement, given.expand(len(measurement)).log()))

    def _join(self, measurement: Tensor, log_level: Tensor) -> Tensor:
        return torch.cat([measurement.reshape(*log_level.shape, -1), log_level[..., None]], -1)

    def split(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Measurements (*batch, *measurement_shape) and their log-levels (*batch) from y (*batch, m + 1)."""
        return y[..., :-1].reshape(*y.shape[:-1], *self.operator.y_shape), y[..., -1]

    def _over_measurement(self, value: Tensor) -> Tensor:
        """(*batch) to (*batch, 1, ...), to broadcast to measurements."""
        return value.reshape(*value.shape, *(1,) * len(self.operator.y_shape))

    def simulate(self, x, generator=None):
        clean = check_finite("operator's output", self(x))
        log_level = self.noise.sample_log(x.shape[: x.ndim - len(self.shape)], clean, generator)
        noise = self.operator.noise.sample(torch.zeros_like(clean), generator)
        return self._join(clean + self._over_measurement(log_level.exp()) * noise, log_level)

    def log_likelihood(self, x, y):
        measurement, log_level = self.split(y)
        level = self._over_measurement(log_level.exp())
        unit = self.operator.noise.log_prob(self(x) / level, measurement / level, len(self.operator.y_shape))
        return unit - self.operator.y_shape.numel() * log_level

    def residual(self, x, y):
        measurement, log_level = self.split(y)
        return self.operator.residual(x, measurement) / self._over_measurement(log_level.exp())

    def noise_variance(self, y):
        return self.operator.noise_variance(y) * (2 * self.split(y)[1].double()).exp()

    def _smoothed(self, mean, y, variance):
        measurement, log_level = self.split(y)
        return self.operator.smoothed(mean, measurement, variance, self._over_measurement(log_level.exp()))  # type: ignore[misc]

    def check_y(self, y):
        share = self.noise.share(check_tensor("y", y, self.y_shape)[:, -1])
        bad = (share < -1e-4) | (share > 1 + 1e-4)  # rounding
        if bad.any():
            low, high = float(self.noise.low), float(self.noise.high)
            raise ValueError(
                f"y must end in the logarithm of a noise level in [{low:g}, {high:g}] (see `observation`), "
                f"got level {float(y[bad][0, -1].exp()):.6g}"
            )
        measurement, log_level = self.split(y)
        self.operator._check_range(measurement, self._over_measurement(log_level.exp()))
        return y

    def condition(self, y):
        """What the problem shows of the measurement at the middle level, and the log-level, from -1 to 1: one more element, or channel."""
        measurement, log_level = self.split(y)
        seen, level = self.operator.condition(measurement), 2 * self.noise.share(log_level) - 1
        return torch.cat([seen, level.reshape(-1, 1, *(1,) * (seen.ndim - 2)).expand(len(y), 1, *seen.shape[2:])], 1)
