"""Our sampler, its corrections and its rivals on problems whose posterior is known:

    python benchmarks/posterior_table.py [--quick] [--problems gmm2 gmm10 gmm40 abs2 poisson2] [--seconds 120] [--seeds 1] [--csv FILE]

Same prior, chain of 40 steps and observations for all. Per method: sliced Wasserstein as a multiple of the floor (two independent exact
sets), coverage of the element-wise 90 % intervals, median |log Z error|, effective sample size, evaluations of a network or denoiser per
draw, wall seconds per 1,000 draws, CPU seconds of training. DPS gets its step size from {0.03, 0.1, 0.3, 1} by its distance on eight
observations of their own.
"""

import argparse
import csv
import logging
import math
import time
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from exact_posteriors import COMMON
from torch import Tensor

from rtb_inverse import Posterior, fit, importance, refine, renoise_mcmc, smc
from rtb_inverse.baselines import dps, fps_smc, twisted
from rtb_inverse.diagnostics import interval_coverage, sliced_wasserstein
from rtb_inverse.particles import Particles
from tasks.exact import EXACT_PROBLEMS, exact_problem

ZETAS = (0.03, 0.1, 0.3, 1.0)


@dataclass
class Row:
    problem: str
    method: str
    seed: int
    distance: float
    distance_error: float
    coverage_90: float
    log_z_error: float
    ess: float
    evaluations: float
    seconds_per_1000: float
    training_seconds: float

    def __str__(self) -> str:
        numbers = [f"{self.coverage_90:.3f}", f"{self.log_z_error:.3f}", f"{self.ess:.3g}", f"{self.evaluations:.0f}"]
        numbers += [f"{self.seconds_per_1000:.2g}", f"{self.training_seconds:.0f}"]
        cells = [self.problem, self.method, str(self.seed), f"{self.distance:.2f} ± {self.distance_error:.2f}", *numbers]
        return "| " + " | ".join(cells).replace("nan", "") + " |"


class Bench:
    """A problem, held-out observations of it, and their exact posterior draws."""

    def __init__(self, name: str, observations: int, draws: int, seed: int = 12345):
        self.name, self.n, generator = name, draws, torch.Generator().manual_seed(seed)
        self.problem = exact_problem(name)
        self.prior, self.model = self.problem.prior, self.problem.problem
        self.x = self.prior.sample(observations, generator)
        self.y = self.model.simulate(self.x, generator)
        self.exact, other = (self.problem.draws(self.y, draws, generator) for _ in range(2))
        self.floor = sliced_wasserstein(self.exact, other, generator=generator)
        self.log_z = self.problem.log_evidence(self.y)

    def distance(self, draws: Particles) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        x = draws.resample(generator=generator).x if draws.log_w.std() > 0 else draws.x
        return sliced_wasserstein(x, self.exact, generator=generator) / self.floor.mean()

    def row(self, method: str, seed: int, sample, has_evidence: bool = False, evaluations: float | None = None, training: float = 0.0):
        start = time.perf_counter()
        draws = sample(self.y, self.n, torch.Generator().manual_seed(100 + seed))
        seconds = time.perf_counter() - start
        distance = self.distance(draws)
        resampled = draws.resample(generator=torch.Generator().manual_seed(2)).x
        coverage = float(interval_coverage(resampled, self.x, 0.9).mean())
        error = float((draws.log_z - self.log_z).abs().median()) if has_evidence else math.nan
        ess = float(draws.ess.mean() / self.n) if has_evidence else math.nan
        evaluations = draws.info.get("evaluations", self.prior.steps) if evaluations is None else evaluations
        spread = float(distance.std() / len(self.y) ** 0.5)
        cost = seconds / self.n / len(self.y) * 1000
        return Row(self.name, method, seed, float(distance.mean()), spread, coverage, error, ess, evaluations, cost, training)


def tuned_dps(bench: Bench) -> float:
    tuning, found = Bench(bench.name, 8, 128, seed=999), {}
    for zeta in ZETAS:
        try:
            draws = dps(tuning.prior, tuning.model, tuning.y, 128, torch.Generator().manual_seed(0), zeta=zeta)
        except ValueError as error:  # states that left the finite numbers
            print(f"({bench.name}: {error})")
            continue
        found[zeta] = float(tuning.distance(draws).mean())
    return min(found, key=lambda zeta: found[zeta])


def trained(bench: Bench, seconds: float, seed: int, start_at: str | None) -> tuple[Posterior, float]:
    """For about that many CPU-seconds."""
    posterior = Posterior(bench.prior, bench.model, start=start_at)
    begin = time.process_time()
    fit(Posterior(bench.prior, bench.model, start=start_at), 10, seed, progress=False, warm_start=1.0, **COMMON)
    steps = max(10, int(seconds / (time.process_time() - begin) * 10))
    begin = time.process_time()
    fit(posterior, steps, seed, progress=False, warm_start=1.0, **COMMON)
    return posterior, time.process_time() - begin


def rows(bench: Bench, seconds: float, seed: int):
    prior, model = bench.prior, bench.model
    zeta = tuned_dps(bench)
    yield bench.row(f"DPS, zeta {zeta:g}", seed, lambda y, n, g: dps(prior, model, y, n, g, zeta=zeta))
    if model.linear:
        yield bench.row("FPS-SMC", seed, lambda y, n, g: fps_smc(prior, model, y, n, g))
    yield bench.row("twisted diffusion sampler", seed, lambda y, n, g: twisted(prior, model, y, n, g, batch_size=4), True)
    npe, training = trained(bench, seconds, seed, "prior")
    yield bench.row("NPE", seed, npe.sample, training=training)
    untrained = Posterior(prior, model)
    yield bench.row("ours, untrained", seed, untrained.sample)
    ours, training = trained(bench, seconds, seed, None)
    yield bench.row("ours", seed, ours.sample, training=training)
    yield bench.row("ours, importance", seed, lambda y, n, g: importance(ours, y, n, g), True, training=training)
    yield bench.row("ours, SMC", seed, lambda y, n, g: smc(ours, y, n, g), True, training=training)
    yield bench.row("ours, re-noising chains", seed, lambda y, n, g: renoise_mcmc(ours, y, n, g, sweeps=4), training=training)
    yield bench.row("ours, refined population", seed, lambda y, n, g: refine(ours, y, n, g, rounds=2, candidates=3), training=training)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["gmm2", "gmm10", "gmm40", "abs2", "poisson2"], choices=list(EXACT_PROBLEMS))
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--observations", type=int, default=20)
    parser.add_argument("--draws", type=int, default=512)
    parser.add_argument("--quick", action="store_true", help="10 seconds of training, 10 observations, 256 draws")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.seconds, args.observations, args.draws = 10.0, 10, 256
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    columns = ["problem", "method", "seed", "SW / floor", "coverage of 90 %", "log Z error", "ESS / n", "evaluations per draw"]
    columns += ["s per 1,000", "training, s"]
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|", flush=True)
    found: list[Row] = []
    for name in args.problems:
        bench = Bench(name, args.observations, args.draws)
        for seed in range(args.seeds):
            for row in rows(bench, args.seconds, seed):
                print(row, flush=True)
                found.append(row)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in found)


if __name__ == "__main__":
    main()
