"""Our sampler, its corrections and its rivals on problems whose posterior is known (`tasks.exact`):

    python benchmarks/posterior_table.py [--quick] [--problems gmm2 ...] [--seeds 3] [--seconds 20] [--output FOLDER]

Same prior, chain of K = 40 steps and observations for all; every seed has its own observations and training. Per method:

    SW / floor      sliced Wasserstein to exact draws, over that of two independent exact sets
    coverage        of the element-wise 90 % intervals, the truth being any exact draw; its level for so few draws is subtracted, 0.9 added
    log Z error     median |log Z - exact|, and ESS / n, of the path weights, where a method has any; n all weighted draws or particles
    evaluations     of the network or denoiser for each draw; a rival is also run at 8 K of them, as our corrections are
    s per 1,000     CPU seconds for 1,000 draws, and for training

256 draws for each of five observations, and 64 at 8 K evaluations and of DPS at its recommended step count, which is run for one seed
only. The floor is always that of as many exact draws.

Every rival has four settings, the usual one first, tried on four observations of their own (those that train: for a quarter of the
time), and the nearest to exact draws is taken: at K evaluations with 128 draws, at 8 K with 32, at DPS's 1,000 steps with 16. Ours is
not tuned. Two processes of one thread; writes posterior_table.csv and posterior_table.md.
"""

import argparse
import copy
import csv
import functools
import logging
import math
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from rtb_inverse import Posterior, fit, importance, refine, renoise_mcmc, smc
from rtb_inverse.baselines import deepinv_sampler, dps, fps_smc, twisted
from rtb_inverse.diagnostics import sliced_wasserstein
from rtb_inverse.particles import Particles
from tasks.exact import EXACT_PROBLEMS, ExactProblem, LinearProblem, exact_problem

STEPS, MULTIPLE, SEEDS = 40, 8, 3
RECOMMENDED = 1000  # steps of DPS in its paper
BATCH = 64  # draws per observation in one call with a gradient
TRAINING = {"states": 1024, "observations": 16, "draws": 16, "chunk_size": None, "bounds": 0, "progress": False}
WAYS: dict[str, dict[str, Any]] = {  # to train
    "ours": {"start": None, "warm_start": 1.0, "lr": 1e-3},
    "NPE": {"start": "prior", "warm_start": 1.0},
    "REINFORCE": {"start": "prior", "warm_start": 0.0, "objective": "vargrad", "behaviours": {"on_policy": 1.0}, "clip": None},
}  # on paths of its own, the gradient of VarGrad is that of KL-regularised REINFORCE with k1 in the reward (`baselines.reinforce`)


@dataclass
class Row:
    """One method on one problem with one seed; NaN: it has no such number."""

    problem: str
    method: str
    seed: int
    distance: float
    distance_error: float
    coverage: float
    log_z_error: float
    ess: float
    evaluations: float
    seconds_per_1000: float
    training_seconds: float
    setting: str = ""


@dataclass
class Size:
    """How much is done."""

    observations: int = 5
    draws: int = 256
    seconds: float = 20.0
    seeds: int = SEEDS
    tuned: bool = True


# Rivals without training: sample(problem, y, n, generator, multiple, **setting), where an evaluation budget of multiple K is spent on
# more steps, or on more particles of which n are kept.


@functools.cache
def known(name: str, steps: int = STEPS) -> ExactProblem:
    """Once per process: what a prior measures of itself is the same at any number of steps, and takes time."""
    if steps == STEPS:
        problem = exact_problem(name, steps)
        problem.prior.denoiser_error(problem.prior.times[:1])
        return problem
    problem = copy.deepcopy(known(name))
    problem.prior.set_steps(steps)
    return problem


def run_dps(name, problem, y, n, generator, multiple, **setting):
    fine = known(name, STEPS * multiple)
    return dps(fine.prior, fine.problem, y, n, generator, batch_size=BATCH, **setting)


def run_fps(name, problem, y, n, generator, multiple, **setting):
    return fps_smc(problem.prior, problem.problem, y, n * multiple, generator, **setting).resample(n, generator)


def run_twisted(name, problem, y, n, generator, multiple, **setting):
    draws = twisted(problem.prior, problem.problem, y, n * multiple, generator, batch_size=BATCH, **setting)
    kept = draws.resample(n, generator)
    return Particles(kept.x, draws.log_z.expand(n, -1).clone(), {"ess": draws.ess / multiple})


def run_deepinv(method, name, problem, y, n, generator, multiple, **setting):
    return deepinv_sampler(method, problem.prior, problem.problem, y, n, generator, steps=STEPS * multiple, batch_size=BATCH, **setting)


def run_prior(name, problem, y, n, generator, multiple):
    return importance(Posterior(problem.prior, problem.problem, start="prior"), y, n, generator, budget=STEPS * multiple)


def over(key: str, *values) -> list[dict[str, Any]]:
    return [{key: value} for value in values]


def pairs(first: str, second: str, *values: tuple[float, float]) -> list[dict[str, Any]]:
    return [{first: x, second: y} for x, y in values]


RIVALS: dict[str, tuple[Callable[..., Particles], list[dict[str, Any]]]] = {
    "prior, importance": (run_prior, [{}]),
    "DPS": (run_dps, over("zeta", 1.0, 0.1, 0.3, 3.0)),
    "FPS-SMC": (run_fps, over("threshold", 0.25, 0.5, 0.75, 1.0)),
    "twisted diffusion sampler": (run_twisted, over("threshold", 0.25, 0.5, 0.75, 1.0)),
    "deepinv DPS": (functools.partial(run_deepinv, "dps"), over("weight", 1.0, 2.0, 4.0, 8.0)),
    "deepinv PiGDM": (functools.partial(run_deepinv, "pigdm"), pairs("weight", "eta", (1.0, 1.0), (0.5, 1.0), (1.0, 0.5), (2.0, 1.0))),
    "deepinv MomentMatching": (
        functools.partial(run_deepinv, "moment_matching"),
        pairs("weight", "eta", (1.0, 1.0), (0.7, 1.0), (1.0, 0.5), (1.4, 1.0)),
    ),
    "deepinv DiffPIR": (
        functools.partial(run_deepinv, "diffpir"),
        pairs("lambda_", "zeta", (0.3, 1.0), (1.0, 0.3), (1.0, 1.0), (7.0, 0.3)),
    ),
    "deepinv DDRM": (functools.partial(run_deepinv, "ddrm"), pairs("eta", "eta_b", (0.85, 0.5), (0.85, 1.0), (1.0, 0.5), (1.0, 1.0))),
}
SPEEDS: dict[tuple[str, str], float] = {}  # CPU seconds of a training step, by problem and way
LEARNING_RATES = {"NPE": (1e-3, 3e-3, 1e-2, 3e-2), "REINFORCE": (3e-4, 1e-3, 3e-3, 1e-2)}


class Bench:
    """A problem, held-out observations of it, and their exact posterior draws."""

    def __init__(self, name: str, observations: int, draws: int, seed: int):
        self.name, self.n, generator = name, draws, Generator().manual_seed(seed)
        self.problem = known(name)
        self.prior, self.model = self.problem.prior, self.problem.problem
        self.y = self.model.simulate(self.prior.sample(observations, generator), generator)
        self.exact, self.other, self.truths = (self.problem.draws(self.y, n, generator) for n in (draws, draws, 4096))
        self.log_z = self.problem.log_evidence(self.y)

    @property
    def few(self) -> int:
        """Draws where they are dear."""
        return max(self.n // 4, 16)

    def covered(self, x: Tensor) -> float:
        """Share of elements of exact draws inside the draws' central 90 % intervals."""
        low, high = torch.quantile(x.double(), torch.tensor([0.05, 0.95], dtype=torch.float64), 0)
        return float(((self.truths >= low) & (self.truths <= high)).double().mean())

    def distance(self, x: Tensor) -> Tensor:
        """(B,)"""

        def to_exact(draws: Tensor) -> Tensor:
            return sliced_wasserstein(draws, self.exact[: len(x)], generator=Generator().manual_seed(1))

        return to_exact(x) / to_exact(self.other[: len(x)]).mean()

    def row(
        self, method: str, seed: int, sample: Callable[..., Particles], n: int | None = None, training: float = 0.0, setting: str = "",
        weighted: bool = False,
    ):  # fmt: skip
        """Run one method. Draws with weights are judged as they come, by their weights only where `weighted` says that these are its."""
        start, n = time.process_time(), n or self.n
        draws = sample(self.y, n, Generator().manual_seed(100 + seed))
        cost = (time.process_time() - start) / n / len(self.y) * 1000
        distance, has_weights = self.distance(draws.x), weighted or "ess" in draws.info
        error = float((draws.log_z - self.log_z).abs().median()) if has_weights else math.nan
        weighed = n * draws.info.get("evaluations", STEPS) / STEPS if "ess" in draws.info else n
        ess = float(draws.info.get("ess", draws.ess).mean() / weighed) if has_weights else math.nan
        spread, evaluations = float(distance.std() / len(self.y) ** 0.5), draws.info.get("evaluations", math.nan)
        coverage = 0.9 + self.covered(draws.x) - self.covered(self.other[:n])
        return Row(self.name, method, seed, float(distance.mean()), spread, coverage, error, ess, evaluations, cost, training, setting)


def trained(bench: Bench, way: str, seconds: float, seed: int, **options) -> tuple[Posterior, float]:
    """For about that many CPU-seconds: the speed is measured on a few steps first. A start that is exact is left as it is."""
    options = WAYS[way] | TRAINING | options
    if options["warm_start"] == 0:
        options["lr_rtb"] = options.pop("lr")
    start_at = options.pop("start")

    def fresh() -> Posterior:
        return Posterior(bench.prior, bench.model, start=start_at)

    posterior = fresh()
    if posterior.guide is not None and posterior.guide.exact and way == "ours":
        return posterior, 0.0
    if (bench.name, way) not in SPEEDS:
        costs = [process_seconds(lambda n=n: fit(fresh(), n, seed, **options)) for n in (2, 8)]
        SPEEDS[bench.name, way] = max(costs[1] - costs[0], 1e-3) / 6
    steps = max(10, int(seconds / SPEEDS[bench.name, way]))
    return posterior, process_seconds(lambda: fit(posterior, steps, seed, **options))


def process_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def applies(method: str, bench: Bench) -> bool:
    """Whether a rival is made for the problem."""
    if "FPS" in method or ("deepinv" in method and method != "deepinv DPS"):
        return isinstance(bench.problem, LinearProblem)
    return not ("deepinv" in method and bench.name == "poisson2")


Settings = dict[tuple[str, int], dict[str, Any]]  # by method and evaluations


def tune(name: str, size: Size) -> Settings:
    """The settings of the rivals for a problem: nearest to exact draws over observations of their own."""
    budgets = {(method, multiple * STEPS): run for method, (run, _) in RIVALS.items() for multiple in (1, MULTIPLE)}
    budgets["DPS", RECOMMENDED] = run_dps
    if not size.tuned:
        return {key: RIVALS[key[0]][1][0] for key in budgets} | {(way, STEPS): {"lr": 3e-3} for way in LEARNING_RATES}
    begin()
    bench, found = Bench(name, 4, size.draws // 2, seed=999), {}

    def nearest(settings: list[dict], sample: Callable[..., Particles]) -> dict:
        scores = []
        for setting in settings:
            try:
                scores.append(float(bench.distance(sample(setting).x).mean()))
            except ValueError:  # states or a loss that left the finite numbers
                scores.append(math.inf)
        return settings[scores.index(min(scores))]

    for (method, evaluations), run in budgets.items():
        n = {STEPS: bench.n, RECOMMENDED: bench.n // 8}.get(evaluations, bench.n // 4)

        def sample(setting, run=run, n=n, multiple=evaluations // STEPS):
            return run(name, bench.problem, bench.y, n, Generator().manual_seed(0), multiple, **setting)

        if applies(method, bench):
            found[method, evaluations] = nearest(RIVALS[method][1], sample) if len(RIVALS[method][1]) > 1 else {}

    def learn(setting, way):
        return trained(bench, way, size.seconds / 4, 0, **setting)[0].sample(bench.y, bench.n, Generator().manual_seed(0))

    for way, rates in LEARNING_RATES.items():
        found[way, STEPS] = nearest(over("lr", *rates), functools.partial(learn, way=way))
    return found


def compare(name: str, size: Size, seed: int, settings: Settings) -> list[Row]:
    """All methods on one problem with one seed."""
    begin()
    bench = Bench(name, size.observations, size.draws, seed=12345 + seed)
    rows = []

    def add(method: str, sample: Callable[..., Particles], evaluations: float | None = None, **options) -> None:
        try:
            row = bench.row(method, seed, sample, **options)
        except ValueError as error:
            logging.warning("%s: %s: %s", name, method, error)
            row = Row(name, method, seed, *[math.nan] * 5, math.nan, math.nan, options.get("training", 0.0), options.get("setting", ""))
        row.evaluations = row.evaluations if evaluations is None else evaluations
        rows.append(row)

    for method, (run, _) in RIVALS.items():
        if applies(method, bench):
            for multiple in (1, MULTIPLE):
                setting = settings[method, STEPS * multiple]
                sample = functools.partial(run, name, bench.problem, multiple=multiple, **setting)
                sample = functools.partial(lambda sample, y, n, g: sample(y=y, n=n, generator=g), sample)
                add(f"{method}, {multiple} K", sample, STEPS * multiple, n=bench.few if multiple > 1 else None, setting=text(setting))
    if seed == 0:
        setting = settings["DPS", RECOMMENDED]
        sample = functools.partial(run_dps, multiple=RECOMMENDED // STEPS, **setting)
        add(
            f"DPS, {RECOMMENDED} steps",
            lambda y, n, g: sample(name, bench.problem, y, n, g),
            RECOMMENDED,
            n=bench.few,
            setting=text(setting),
        )
    for way in LEARNING_RATES:
        other, training = trained(bench, way, size.seconds, seed, **settings[way, STEPS])
        add(way, lambda y, n, g, p=other: importance(p, y, n, g), training=training, setting=text(settings[way, STEPS]), weighted=True)
    untrained = Posterior(bench.prior, bench.model)
    add("ours, untrained", lambda y, n, g: importance(untrained, y, n, g), weighted=True)
    ours, training = trained(bench, "ours", size.seconds, seed)
    add("ours", lambda y, n, g: importance(ours, y, n, g), training=training, weighted=True)
    add("ours, plain draws", ours.sample, STEPS, training=training)
    budget = {"budget": MULTIPLE * STEPS}
    for method, correct in {"importance": importance, "SMC": smc, "re-noising chains": renoise_mcmc, "refined population": refine}.items():
        add(f"ours, {method}", lambda y, n, g, correct=correct: correct(ours, y, n, g, **budget), n=bench.few, training=training)
    return rows


def text(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key.rstrip('_')} {value:g}" for key, value in setting.items())


def begin() -> None:
    """In each process."""
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


# What is written


def summary(rows: list[Row]) -> list[str]:
    """Markdown: per problem and method, means over the seeds; the error of the distance over all observations."""
    columns = ["method", "SW / floor", "coverage of 90 %", "median log Z error", "ESS / n", "evaluations per draw", "CPU s per 1,000 draws"]
    columns += ["training, CPU s", "setting"]
    lines = []
    for problem in dict.fromkeys(row.problem for row in rows):
        lines += ["", f"### {problem}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        own = [row for row in rows if row.problem == problem]
        for method in dict.fromkeys(row.method for row in own):
            lines.append(line(method, [row for row in own if row.method == method]))
    return lines[1:]


def line(method: str, rows: list[Row]) -> str:
    def mean(name: str) -> float:
        return sum(getattr(row, name) for row in rows) / len(rows)

    def cell(value: float, form: str) -> str:
        return "" if math.isnan(value) else format(value, form)

    error = math.sqrt(sum(row.distance_error**2 for row in rows)) / len(rows)
    distance = "failed" if math.isnan(mean("distance")) else f"{mean('distance'):.2f} ± {error:.2f}"
    cells = [method, distance, cell(mean("coverage"), ".3f"), cell(mean("log_z_error"), ".3f"), cell(mean("ess"), ".3g")]
    cells += [cell(mean("evaluations"), ".0f"), cell(mean("seconds_per_1000"), ".2g"), cell(mean("training_seconds"), ".0f")]
    return f"| {' | '.join(cells)} | {rows[0].setting} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", choices=list(EXACT_PROBLEMS), help="default: all; with --quick all but gmm100")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--seconds", type=float, default=Size.seconds, help="CPU seconds of each training")
    parser.add_argument("--quick", action="store_true", help="one seed, 4 observations, 32 draws, 2 s of training, not tuned, no gmm100")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    args.problems = args.problems or [name for name in EXACT_PROBLEMS if not (args.quick and name == "gmm100")]
    size = Size(4, 32, 2.0, 1, tuned=False) if args.quick else Size(seconds=args.seconds, seeds=args.seeds)
    start, rows = time.perf_counter(), []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        # the slowest problems first, so that both processes end together
        names = sorted(args.problems, key=lambda name: -exact_problem(name, 2).prior.shape.numel())
        running: dict[Any, str] = {pool.submit(tune, name, size): name for name in names}
        tuning = set(running)
        bar = tqdm(total=len(names) * (1 + size.seeds), desc="problems and seeds")
        while running:
            for job in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(job)
                bar.update()
                if job in tuning:
                    running |= {pool.submit(compare, name, size, seed, job.result()): name for seed in range(size.seeds)}
                else:
                    rows += job.result()
                    write(sorted(rows, key=lambda row: (args.problems.index(row.problem), row.seed)), args.output)
    bar.close()
    print(f"{time.perf_counter() - start:.0f} s; {args.output / 'posterior_table.md'}")


def write(rows: list[Row], folder: Path) -> None:
    """The table as it is so far."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "posterior_table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (folder / "posterior_table.md").write_text("\n".join(summary(rows)) + "\n")


if __name__ == "__main__":
    main()
