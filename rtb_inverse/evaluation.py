"""Judge a posterior on held-out observations: numbers with standard errors, a JSON report, a picture."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor

from rtb_inverse.chains import Trajectory, path_log_prob, rollout
from rtb_inverse.checks import check_count, check_tensor, check_writable
from rtb_inverse.corrections import importance
from rtb_inverse.diagnostics import (
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
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import GaussianNoise

LEVELS = (0.5, 0.8, 0.9)
CALIBRATED = 10  # observations that a test of calibration asks for


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


@dataclass
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
    """

    numbers: dict[str, Estimate]
    draws: Particles
    observations: Observations
    seconds: float
    settings: dict = field(default_factory=dict)
    p_values: dict[str, float] = field(default_factory=dict)
    ranks: Tensor | None = None
    coverage: Coverage | None = None

    def __str__(self) -> str:
        tests = [f"{'p-value of ' + name:>28}  {p:.2g}" for name, p in self.p_values.items()]
        return "\n".join([f"{name:>28}  {estimate}" for name, estimate in self.numbers.items()] + tests)

    def to_dict(self) -> dict:
        numbers = {name: asdict(estimate) for name, estimate in self.numbers.items()}
        return {"numbers": numbers, "p_values": self.p_values, "settings": self.settings, "seconds": self.seconds}

    def to_markdown(self) -> str:
        """The numbers as a page."""
        settings = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in self.settings.items()
        )
        lines = ["# How close the posterior is", "", settings, "", "| | mean over observations | standard error |", "|---|---|---|"]
        lines += [f"| {name} | {estimate.value:.4g} | {estimate.error:.2g} |" for name, estimate in self.numbers.items()]
        if self.p_values:
            lines += ["", "| test of calibration | p-value |", "|---|---|"] + [f"| {name} | {p:.2g} |" for name, p in self.p_values.items()]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path, name: str = "report") -> None:
        """Write `name`.json, `name`.md, and `name`.png: coverage curve, rank histogram and weights."""
        from rtb_inverse.plots import calibration_figure

        file = check_writable("folder", folder) / f"{name}.json"
        file.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=True) + "\n")
        file.with_suffix(".md").write_text(self.to_markdown())
        calibration_figure(self.draws.log_w, file.with_suffix(".png"), self.ranks, self.coverage)


@torch.no_grad()
def simulate_observations(posterior: Posterior, n: int, generator: Generator | None = None, progress: bool = False) -> Observations:
    """n observations from the prior's own roll-outs: (path, x, y) draws of the joint distribution."""
    paths = rollout(posterior.prior, check_count("n", n), None, generator, progress=progress)
    x = posterior.decode(paths.x_0[:, 0])
    y = posterior.problem.simulate(x, generator)
    # one path for each of n observations: (K + 1, N = 1, B = n, *shape)
    return Observations(y, x, Trajectory(paths.x.transpose(1, 2), paths.times, y))


@torch.no_grad()
def observe(posterior: Posterior, x: Tensor, generator: Generator | None = None) -> Observations:
    """Observations of clean examples x, (B, *data_shape)."""
    x = check_tensor("x", x, posterior.prior.data_shape).to(posterior.gate.device, posterior.gate.dtype)
    return Observations(posterior.problem.simulate(x, generator), x)


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
        prior's paths are known), learned log_z, ess (of n), log_likelihood of the draws, chi_squared of y about them (Gaussian noise; 1 for
        the posterior); where x is known: psnr of the posterior mean (data range 2), ssim (images), crps, the coverage of central intervals,
        element by element ("coverage_90" should be `nominal_90`), and the p-values of two tests of calibration.
    """
    check_count("n", n, 2)
    start = time.perf_counter()
    held = observations if isinstance(observations, Observations) else Observations(observations)
    y = posterior.check_y(held.y)
    draws = importance(posterior, y, n, generator, chunk_size=chunk_size, progress=progress)
    values = {
        "elbo": elbo(draws.log_w),
        "log_z_is": log_mean_weight(draws.log_w),
        "log_z_learned": posterior.log_evidence(y).expand(len(y)),
        "ess": effective_sample_size(draws.log_w),
        "log_likelihood": posterior.problem.log_likelihood(draws.x, y).mean(0),
    }
    if held.paths is not None:
        paths = held.paths
        log_w = path_log_prob(posterior.prior, paths, chunk_size) + posterior.log_likelihood(paths.x_0, y)
        values["eubo"] = eubo(log_w - path_log_prob(posterior, paths, chunk_size))
    if isinstance(posterior.problem.noise, GaussianNoise):
        residual = (y - posterior.problem(draws.x.flatten(0, 1)).unflatten(0, (n, len(y)))) / posterior.problem.noise.std
        values["chi_squared"] = chi_squared(residual).reduced
    p_values, ranks, coverage = {}, None, None
    if held.x is not None:
        values["log_likelihood_of_truth"] = posterior.problem.log_likelihood(held.x, y)
        values["psnr"] = psnr(draws.x.mean(0), held.x)
        if held.x.ndim == 4:
            values["ssim"] = ssim(draws.x.mean(0), held.x)
        values["crps"] = crps(draws.x, held.x)
        for level in LEVELS:
            values[f"coverage_{level * 100:.0f}"] = interval_coverage(draws.x, held.x, level)
        if len(y) >= CALIBRATED:
            ranks, coverage = sbc_ranks(draws.x, held.x, generator=generator), tarp(draws.x, held.x, generator=generator)
            p = rank_uniformity(ranks, n)
            p_values = {"sbc": min(1.0, float(p.min()) * len(p)), "tarp": coverage.p_value}
    numbers = {name: Estimate.of(value) for name, value in values.items()}
    settings = {"observations": len(y), "draws": n, "steps": posterior.steps, "start": posterior.start}
    settings |= {f"nominal_{level * 100:.0f}": interval_level(n, level) for level in LEVELS if held.x is not None}
    return Report(numbers, draws, held, time.perf_counter() - start, settings, p_values, ranks, coverage)


def save_panel(posterior: Posterior, report: Report, file: str | Path, rows: int = 6, columns: int = 8) -> bool:
    """Draw truth, observation, mean, standard deviation and draws, for x of shape (C, H, W); returns whether there was something to draw.
    What was observed is shown through `problem.image` where it has one (inpainting), else through the first channels of `condition`."""
    shape = posterior.prior.data_shape
    if len(shape) != 3 or shape[0] not in (1, 3):
        return False
    from rtb_inverse.plots import posterior_panel

    y, x = report.observations.y[:rows], report.observations.x
    draws = report.draws.x[:, :rows]
    problem = posterior.problem
    image = getattr(problem, "image", None)
    observed = problem.condition(y)[:, : shape[0]] if image is None else image(y, fill=float("nan"))
    posterior_panel(observed, draws.mean(0), draws.std(0), draws[:columns], file, None if x is None else x[:rows])
    return True
