"""Judge a posterior on held-out observations: numbers with standard errors; a JSON report, a page, pictures."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from rtb_inverse.chains import Trajectory, path_log_prob, rollout
from rtb_inverse.checks import check_count, check_tensor, check_writable
from rtb_inverse.corrections import importance
from rtb_inverse.diagnostics import (
    LEAST_OBSERVATIONS,
    Coverage,
    Estimate,
    chi_squared,
    crps,
    effective_sample_size,
    elbo,
    eubo,
    interval_coverage,
    interval_level,
    log_mean_weight,
    psnr,
    rank_uniformity,
    sbc_ranks,
    ssim,
    tarp,
)
from rtb_inverse.particles import Particles
from rtb_inverse.posterior import Posterior, check_posterior
from rtb_inverse.problems import InverseProblem

LEVELS = (0.5, 0.8, 0.9)
BRIEF = ("psnr", "crps", "chi_squared", "coverage_90")  # the last with its nominal level
TRUTH = "the truth is not known: no log_likelihood_of_truth, psnr, ssim, crps, coverage, sbc or tarp"
MEANING = {
    "elbo": "lower bound of log p(y), over the posterior's own paths",
    "eubo": "upper bound of log p(y), over prior roll-outs that made the y; its gap to the ELBO says how far the sampler is",
    "log_z_is": "importance-sampled log p(y); in the mean a lower bound too, that rises with the draws",
    "log_z_learned": "log Z(y) as training learned it",
    "ess": "effective sample size of the path weights, of the number of draws; blind to a missing mode",
    "log_likelihood": "log-likelihood of the draws; in the mean that of the truth, for the posterior",
    "log_likelihood_of_truth": "log-likelihood of the truth",
    "chi_squared": "squared residual of y about the draws over its noise; 1 for the posterior, blind to what y does not constrain",
    "psnr": "of the posterior mean, in dB; higher is better, blind to the draws' spread",
    "ssim": "structural similarity of the posterior mean, at most 1; higher is better, blind to the draws' spread",
    "crps": "continuous ranked probability score of the draws, element by element, in the units of x; lower is better",
    "sbc": "ranks of the truth among the draws, by element or random projection; small: not calibrated",
    "tarp": "expected coverage of balls around random points; small: not calibrated",
}


@dataclass
class Observations:
    """Held-out observations.

    Attributes:
        y: (B, *y_shape).
        x: what made them, in data space, (B, *data_shape), where it is known.
        paths: prior roll-outs that ended in x, where they are known: with them the EUBO is valid.
    """

    y: Tensor
    x: Tensor | None = None
    paths: Trajectory | None = None

    def to(self, device: torch.device) -> "Observations":
        """On another device."""
        y, x = (None if value is None else value.to(device) for value in (self.y, self.x))
        return Observations(y, x, None if self.paths is None else replace(self.paths, x=self.paths.x.to(device), y=y))  # type: ignore[arg-type]


@dataclass(repr=False)
class Report:
    """What `evaluate` found.

    Attributes:
        numbers: name to mean over observations and its standard error.
        draws: the draws that were judged, (N, B, *data_shape), with their path weights.
        observations: those that were judged.
        seconds: wall time of the evaluation.
        p_values: of tests that all is well: "sbc" (ranks of the truth among the draws, of each element, or of 32 random projections where
            there are more; corrected for their number) and "tarp" (expected coverage), where x is known for at least 10 observations.
        ranks, coverage: what these tests looked at.
        observed: y as images (B, C, H, W) to show beside those of x, NaN where nothing was seen; None where x are no images.
        notes: why a number or its standard error is missing, or is not finite.
    """

    numbers: dict[str, Estimate]
    draws: Particles
    observations: Observations
    seconds: float
    settings: dict = field(default_factory=dict)
    p_values: dict[str, float] = field(default_factory=dict)
    ranks: Tensor | None = None
    coverage: Coverage | None = None
    observed: Tensor | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        tests = [f"{'p-value of ' + name:>28}  {p:.2g}" for name, p in self.p_values.items()]
        return "\n".join([f"{name:>28}  {estimate}{self._nominal(name)}" for name, estimate in self.numbers.items()] + tests)

    __repr__ = __str__

    def __getitem__(self, name: str) -> Estimate:
        """One of the numbers."""
        return self.numbers[name]

    def _nominal(self, name: str) -> str:
        level = self.settings.get("nominal_" + name.removeprefix("coverage_"))
        return "" if level is None else f" (calibrated: {level:.3f})"

    def to_dict(self) -> dict:
        """For JSON; None where a number is not finite, and `notes` say why."""
        numbers = {name: estimate.to_dict() for name, estimate in self.numbers.items()}
        return {"numbers": numbers, "p_values": self.p_values, "settings": self.settings, "seconds": self.seconds, "notes": self.notes}

    def _meaning(self, name: str) -> str:
        if name.startswith("coverage_"):
            nominal = self.settings["nominal_" + name.removeprefix("coverage_")]
            return f"share of the truth's elements in the central intervals of level {nominal:.4g}; below: draws too narrow or shifted"
        return MEANING[name]

    def to_markdown(self) -> str:
        """The numbers as a page."""
        settings = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in self.settings.items()
        )
        lines = ["# How close the posterior is", "", settings, ""]
        lines += ["| number | mean over observations | standard error | what it is |", "|---|---|---|---|"]
        for name, estimate in self.numbers.items():
            error = f"{estimate.error:.2g}" if math.isfinite(estimate.error) else "see below"
            lines.append(f"| {name} | {estimate.value:.4g} | {error} | {self._meaning(name)} |")
        if self.p_values:
            lines += ["", "| test of calibration | p-value | what it is |", "|---|---|---|"]
            lines += [f"| {name} | {p:.2g} | {self._meaning(name)} |" for name, p in self.p_values.items()]
        return "\n".join([*lines, "", *(f"- {name}: {note}" for name, note in self.notes.items())]) + "\n"

    def save(self, folder: str | Path, name: str = "report") -> None:
        """Write `name`.json, `name`.md, `name`.png (coverage curve, rank histogram, weight histogram) and `name`_panel.png (truth, what was
        observed, mean, standard deviation, draws). The page shows them, and the bounds over training where these are in the folder."""
        from rtb_inverse.plots import calibration_figure

        folder = check_writable("folder", folder)
        (folder / f"{name}.json").write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        calibration_figure(self.draws.log_w, folder / f"{name}.png", self.ranks, self.coverage)
        self.save_panel(folder / f"{name}_panel.png")
        pictures = {"Calibration and weights": f"{name}.png", "Draws": f"{name}_panel.png", "Evidence bounds over training": "training.png"}
        shown = [f"\n![{title}]({file})\n" for title, file in pictures.items() if (folder / file).is_file()]
        (folder / f"{name}.md").write_text(self.to_markdown() + "".join(shown))

    def save_panel(self, file: str | Path, rows: int = 6, columns: int = 8) -> None:
        """Draw truth, observation, mean, standard deviation and draws of the first observations: as images where x has shape (C, H, W), as
        a scatter where it has two elements, else element by element."""
        from rtb_inverse.plots import posterior_panel, vector_panel

        x, draws = self.observations.x, self.draws.x[:, :rows]
        truth = None if x is None else x[:rows].to(draws)
        if self.observed is None:
            vector_panel(draws, file, truth)
        else:
            posterior_panel(self.observed[:rows], draws.mean(0), draws.std(0), draws[:columns], file, truth)


@torch.no_grad()
def simulate_observations(posterior: Posterior, n: int, generator: Generator | None = None, progress: bool = False) -> Observations:
    """n observations from the prior's own roll-outs: (path, x, y) draws of the joint distribution."""
    paths = rollout(check_posterior(posterior).prior, check_count("n", n), None, generator, progress=progress)
    x = posterior.decode(paths.x_0[:, 0])
    y = posterior.problem.simulate(x, generator)
    # one path for each of n observations: (K + 1, N = 1, B = n, *shape)
    return Observations(y, x, Trajectory(paths.x.transpose(1, 2), paths.times, y))


@torch.no_grad()
def observe(posterior: Posterior, x: Tensor, generator: Generator | None = None) -> Observations:
    """Observations of clean examples x, (B, *data_shape)."""
    x = check_tensor("x", x, check_posterior(posterior).prior.data_shape).to(posterior.gate.device, posterior.gate.dtype)
    return Observations(posterior.problem.simulate(x, generator), x)


@torch.no_grad()
def scores(problem: InverseProblem, draws: Tensor, y: Tensor | None, truth: Tensor | None = None) -> dict[str, Tensor]:
    """What draws of any method can be asked, by names that `MEANING` explains, each (B,).

    Args:
        draws: in data space, (N, B, *data_shape), unweighted. y: (B, *y_shape). truth: what made y, (B, *data_shape), where it is known.
    """
    values, residual = {"log_likelihood": problem.log_likelihood(draws, y).mean(0)}, problem.residual(draws, y)
    if residual is not None:
        values["chi_squared"] = chi_squared(residual).reduced
    if truth is not None:
        mean = draws.mean(0)
        values |= {"log_likelihood_of_truth": problem.log_likelihood(truth, y), "psnr": psnr(mean, truth)}
        if truth.ndim == 4:
            values["ssim"] = ssim(mean, truth)
        values["crps"] = crps(draws, truth)
        values |= {f"coverage_{level * 100:.0f}": interval_coverage(draws, truth, level) for level in LEVELS}
    return values


def judge(
    problem: InverseProblem, sample: Callable[[], Particles], y: Tensor, truth: Tensor, generator: Generator | None = None,
    proposal: bool = False,
) -> tuple[Tensor, str]:  # fmt: skip
    """Draws of any sampler, resampled by their weights, (N, B, *data_shape), and a line: its main `scores` (`BRIEF`), the log evidence
    where its weights tell one, and wall time. Of a `proposal`, as `importance` gives it, the draws as they come, and its ELBO too."""
    start, draws = time.perf_counter(), sample()
    seconds = (time.perf_counter() - start) / draws.log_w.numel()
    x = draws.x if proposal else draws.resample(generator=generator).x
    found = scores(problem, x, y.to(x.device), truth.to(x.device))
    said = ", ".join(f"{name} {Estimate.of(found[name])}" for name in BRIEF if name in found)
    said += f" ({interval_level(len(x), 0.9):.3f})" + (f", elbo {Estimate.of(elbo(draws.log_w))}" if proposal else "")
    said += f", log_z {Estimate.of(draws.log_z)}" if draws.log_w.any() else ""
    return x, f"{said}, {seconds:.2g} s per draw"


def report_to(folder: str | Path) -> Callable[[str], None]:
    """A `print` that also writes what it says to report.txt in a folder, which it makes."""
    file = check_writable("output", folder) / "report.txt"
    file.write_text("")

    def say(text: str) -> None:
        print(text, flush=True)
        with file.open("a") as report:
            report.write(text + "\n")

    return say


@torch.no_grad()
def evaluate(
    posterior: Posterior, observations: Observations | Tensor, n: int = 64, generator: Generator | None = None, *,
    chunk_size: int | None = 4096, progress: bool = False,
) -> Report:  # fmt: skip
    """Judge a posterior.

    Args:
        observations: `Observations`, or just y (B, *y_shape).
        n: draws per observation, at least 2.
        chunk_size: most states in one scoring call.

    Returns:
        A `Report` with, averaged over observations: elbo <= log_z_is (a lower bound too, that rises with n) <= log Z <= eubo (where the
        prior's paths are known), ess (of n), log_z_learned (if it was), log_likelihood of the draws, chi_squared of y about them (where
        the noise is a model of `noise`; 1 for the posterior); where x is known: psnr of the posterior mean (data range 2), ssim (images),
        crps, the coverage of central intervals, element by element ("coverage_90" should be `nominal_90`), and the p-values of two tests
        of calibration. With a single observation, the standard errors that there are, are over its draws.

    Raises:
        ValueError: for draws or weights that are NaN, or where all weights of an observation are 0.
    """
    check_posterior(posterior), check_count("n", n, 2)
    start = time.perf_counter()
    held = observations if isinstance(observations, Observations) else Observations(observations)
    y = posterior.check_y(held.y)
    if held.x is not None:
        check_tensor("observations.x", held.x, posterior.prior.data_shape)
        if len(held.x) != len(y):
            raise ValueError(f"observations must hold as many x as y, got {len(held.x)} and {len(y)}")
    held = held.to(posterior.gate.device)
    draws = importance(posterior, y, n, generator, chunk_size=chunk_size, progress=progress)
    values = {
        "elbo": elbo(draws.log_w),
        "log_z_is": log_mean_weight(draws.log_w),
        "ess": effective_sample_size(draws.log_w),
    }
    if posterior.log_z.learned:
        values["log_z_learned"] = posterior.log_evidence(y).expand(draws.log_w.shape[1])
    absent = {} if held.paths is not None else {"eubo": "needs the prior's roll-outs that made the y (simulate_observations)"}
    if held.paths is not None:
        paths = held.paths
        log_w = path_log_prob(posterior.prior, paths, chunk_size) + posterior.log_likelihood(paths.x_0, y)
        values["eubo"] = eubo(log_w - path_log_prob(posterior, paths, chunk_size))
    values |= scores(posterior.problem, draws.x, y, held.x)
    if "chi_squared" not in values:
        absent["chi_squared"] = "needs a noise model that knows its mean and variance"
    p_values, ranks, coverage = {}, None, None
    if held.x is not None:
        if len(held.x) < LEAST_OBSERVATIONS:
            absent["p-values"] = f"a test of calibration needs at least {LEAST_OBSERVATIONS} observations"
        else:
            absent["p-values"] = "are uniform where calibrated: they have no standard error"
            ranks, coverage = sbc_ranks(draws.x, held.x, generator=generator), tarp(draws.x, held.x, generator=generator)
            p = rank_uniformity(ranks, n)
            p_values = {"sbc": min(1.0, float(p.min()) * len(p)), "tarp": coverage.p_value}
    else:
        absent["truth"] = TRUTH
    numbers, notes = _estimates(values, draws)
    settings = {"observations": draws.log_w.shape[1], "draws": n, "steps": posterior.steps, "start": posterior.start}
    settings |= {f"nominal_{level * 100:.0f}": interval_level(n, level) for level in LEVELS if held.x is not None}
    seconds, observed = time.perf_counter() - start, _observed(posterior, y)
    return Report(numbers, draws, held, seconds, settings, p_values, ranks, coverage, observed, notes | absent)


def _observed(posterior: Posterior, y: Tensor | None) -> Tensor | None:
    """The problem's picture of y, no more channels than x has; None where there is none."""
    shape = posterior.prior.data_shape
    if len(shape) != 3 or y is None:
        return None
    seen = posterior.problem.picture(y)
    return seen[:, : shape[0]] if seen.ndim == 4 else None


def _estimates(values: dict[str, Tensor], draws: Particles) -> tuple[dict[str, Estimate], dict[str, str]]:
    """Means over observations with their standard errors; of one observation, those of means over its draws. And why one is missing."""
    numbers, notes = {name: Estimate.of(value) for name, value in values.items()}, {}
    if draws.log_w.shape[1] == 1:
        numbers["elbo"] = Estimate.of(draws.log_w)
        numbers["log_z_is"] = Estimate(float(draws.log_z), float(draws.log_z_error))
        notes["one observation"] = "standard errors of elbo and log_z_is are over its draws; the other numbers have none"
    for name, estimate in numbers.items():
        if not math.isfinite(estimate.value):
            notes[name] = f"{estimate.value}, so without a standard error"
    return numbers, notes
