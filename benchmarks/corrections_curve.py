"""What each network evaluation buys: the four corrections at equal budgets, on problems whose posterior is known.

    python benchmarks/corrections_curve.py [--problems gmm10 abs2] [--start prior] [--multiples 1 2 4 8 16] [--output FILE.png]

A mixture of 25 Gaussians with a random linear operator, and y = |x| + noise. The posterior is not trained: guided, or with `--start prior`
a bad proposal. A budget is a multiple of K, the network evaluations of one plain draw. Per method: sliced Wasserstein to exact draws, over
the floor (two independent exact sets), and the root mean square error of log Z, with standard errors over observations and seeds; log Z
of Markov chains is not known. One CPU thread; prints a table, writes a picture.
"""

import argparse
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
import matplotlib.ticker
import torch
from torch import Tensor

from rtb_inverse import Posterior, importance, refine, renoise_mcmc, smc
from rtb_inverse.diagnostics import Estimate, sliced_wasserstein
from rtb_inverse.particles import Particles
from tasks.exact import exact_problem

matplotlib.use("Agg")
from matplotlib import pyplot as plt

METHODS: dict[str, tuple[Callable[..., Particles], float, bool]] = {  # the least multiple of K, and whether it estimates log Z
    "importance": (importance, 1, True),
    "smc": (smc, 1, True),
    "renoise_mcmc": (renoise_mcmc, 2, False),
    "refine": (refine, 2, False),
}
STYLES = {"importance": ("C0", "o"), "smc": ("C1", "s"), "renoise_mcmc": ("C2", "^"), "refine": ("C3", "D")}
SETS = 8  # of exact draws, to average the distance over


@dataclass
class Point:
    """One method at one budget: numbers with standard errors."""

    method: str
    evaluations: float
    distance: Estimate
    log_z_error: Estimate | None


class Bench:
    """A problem, observations of it, exact draws, the floor and the evidence."""

    def __init__(self, name: str, start: str, steps: int, observations: int, draws: int):
        problem = exact_problem(name, steps)
        self.n, self.posterior, generator = draws, Posterior(problem.prior, problem.problem, start), torch.Generator().manual_seed(12345)
        self.y = problem.problem.simulate(problem.prior.sample(observations, generator), generator)
        self.exact = [problem.draws(self.y, draws, generator) for _ in range(SETS)]
        self.floor = torch.stack([sliced_wasserstein(*pair, generator=generator) for pair in pairwise(self.exact)]).mean(0)
        self.log_z = problem.log_evidence(self.y)

    def distance(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.stack([sliced_wasserstein(x, exact, generator=generator) for exact in self.exact]).mean(0) / self.floor

    def point(self, method: str, multiple: float, seeds: int) -> Point:
        correct, _, has_evidence = METHODS[method]
        distances, squares, evaluations = [], [], []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            draws = correct(self.posterior, self.y, self.n, generator, budget=multiple * self.posterior.steps)
            distances.append(self.distance(draws.x))
            squares.append((draws.log_z - self.log_z).square())
            evaluations.append(draws.info["evaluations"])
        return Point(method, sum(evaluations) / seeds, of_seeds(distances), root(of_seeds(squares)) if has_evidence else None)

    def plain(self, seeds: int) -> Point:
        draws = [self.posterior.sample(self.y, self.n, torch.Generator().manual_seed(seed)) for seed in range(seeds)]
        return Point("plain draws", self.posterior.steps, of_seeds([self.distance(d.x) for d in draws]), None)


def of_seeds(values: list[Tensor]) -> Estimate:
    """Of (B,) for each seed: the mean over all, its error by the spread of the observations' means."""
    return Estimate.of(torch.stack(values).mean(0))


def root(square: Estimate) -> Estimate:
    """The root of a mean square, by the delta method."""
    value = math.sqrt(square.value)
    return Estimate(value, square.error / (2 * value))


def draw_figure(found: dict[str, list[Point]], file: Path) -> None:
    """A column for each problem: distance above, error of log Z below."""
    figure, axes = plt.subplots(2, len(found), figsize=(5.2 * len(found), 7.4), sharex="col", squeeze=False)
    for column, (name, points) in zip(axes.T, found.items(), strict=True):
        plain = next(p for p in points if p.method == "plain draws")
        top, bottom = column
        top.axhline(plain.distance.value, color="0.4", linestyle="--", label="plain draws (K)")
        top.axhline(1.0, color="0.7", linestyle=":", label="floor (exact draws)")
        for i, (method, (colour, marker)) in enumerate(STYLES.items()):
            own = [p for p in points if p.method == method]
            options = {"color": colour, "marker": marker, "capsize": 3, "markersize": 5, "label": method}
            x = [p.evaluations * 1.03 ** (i - 1.5) for p in own]  # beside each other
            top.errorbar(x, [p.distance.value for p in own], [p.distance.error for p in own], **options)
            if METHODS[method][2]:
                bottom.errorbar(x, [p.log_z_error.value for p in own], [p.log_z_error.error for p in own], **options)
        top.set_title(name)
        for axis in column:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(True, which="both", alpha=0.25)
            for part in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter, axis.xaxis.set_major_formatter):
                part(matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:.3g}"))
            axis.yaxis.set_minor_locator(matplotlib.ticker.LogLocator(subs=(2, 3, 5)))
            axis.set_xticks(sorted({plain.evaluations, *(p.evaluations for p in points if p.method == "importance")}))
        low, high = top.get_ylim()
        top.set_ylim(min(low, 0.7), max(high, 2.5))
        bottom.set_xlabel("network evaluations per returned draw")
    axes[0, 0].set_ylabel("sliced Wasserstein / floor")
    axes[1, 0].set_ylabel("root mean square error of log Z")
    axes[0, 0].legend(fontsize=8, loc="upper right")
    axes[1, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["gmm10", "abs2"])
    parser.add_argument("--start", choices=["guided", "prior"], default="guided")
    parser.add_argument("--multiples", type=float, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--steps", type=int, default=20, help="K")
    parser.add_argument("--observations", type=int, default=12)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="by default corrections_curve.png, or corrections_curve_prior.png, beside this file")
    args = parser.parse_args()
    name = "corrections_curve.png" if args.start == "guided" else "corrections_curve_prior.png"
    output = args.output or Path(__file__).with_name(name)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    begin, found = time.perf_counter(), {}
    print("| problem | method | budget / K | evaluations per draw | SW / floor | RMS error of log Z |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in args.problems:
        bench = Bench(name, args.start, args.steps, args.observations, args.draws)
        found[name] = [bench.plain(args.seeds)]
        print(f"| {name} | plain draws | 1 | {bench.posterior.steps} | {found[name][0].distance} | |", flush=True)
        for method, (_, least, _) in METHODS.items():
            for multiple in (m for m in args.multiples if m >= least):
                point = bench.point(method, multiple, args.seeds)
                found[name].append(point)
                cells = [name, method, f"{multiple:g}", f"{point.evaluations:.0f}", point.distance, point.log_z_error or ""]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    draw_figure(found, output)
    print(f"\n{time.perf_counter() - begin:.0f} s; picture in {output.name}")


if __name__ == "__main__":
    main()
