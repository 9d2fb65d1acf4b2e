"""How close the trained posterior is to exact ones (`tasks.exact`): by default a mixture of 25 Gaussians in 2, 10 and 40 dimensions with a
random linear operator to 1 or 2 dimensions, and y = |x| + noise in 2-D.

    python benchmarks/exact_posteriors.py [--problems gmm2 gmm10 gmm40 abs2] [--methods ...] [--seconds 150] [--seeds 3]

One CPU thread. Each method trains for `--seconds` CPU-seconds (the number of steps is measured beforehand). Judged over held-out
observations: sliced Wasserstein to exact draws as a multiple of the floor (two independent exact sets), effective sample size of the
path weights beside the oracle's (the exact posterior's denoiser in the same Gaussian steps), error of the importance-sampled log Z.
"""

import argparse
import json
import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rtb_inverse import Posterior, fit, importance, path_log_prob, rollout
from rtb_inverse.chains import Prior
from rtb_inverse.diagnostics import Estimate, effective_sample_size, sliced_wasserstein
from rtb_inverse.schedules import expand
from tasks.exact import EXACT_PROBLEMS, ExactProblem, LinearProblem, exact_problem

BACKTRACKING = {"on_policy": 0.5, "replay": 0.25, "simulated": 0.25}
METHODS = {  # start, and options of `fit`; None: not trained
    "untrained": ("guided", None),
    "warm start": ("guided", {"warm_start": 1.0}),
    "warm start, then RTB": ("guided", {"warm_start": 0.8}),
    "RTB alone": ("guided", {"warm_start": 0.0, "behaviours": {"on_policy": 1.0}, "lr_rtb": 1e-3}),
    "RTB alone with backtracking": ("guided", {"warm_start": 0.0, "behaviours": BACKTRACKING, "lr_rtb": 1e-3}),
    "from the prior, RTB alone": ("prior", {"warm_start": 0.0, "behaviours": {"on_policy": 1.0}, "lr_rtb": 1e-3}),
    "from the prior, RTB alone with backtracking": ("prior", {"warm_start": 0.0, "behaviours": BACKTRACKING, "lr_rtb": 1e-3}),
}
COMMON = {"lr": 1e-3, "states": 1024, "observations": 16, "draws": 16, "chunk_size": None}


class Oracle(Prior):
    """The exact posterior's denoiser in Gaussian steps, with the variances that its own error for each y asks for."""

    def __init__(self, exact: Prior, generator, draws: int = 256):
        super().__init__(exact.shape, exact.schedule, exact.steps, exact.eta, exact.variance, exact.min_std)
        self.exact = exact
        x_0 = exact.distribution.sample((draws,), generator)
        self.table = {}
        for t in self.times[:-1]:
            noise = torch.randn(x_0.shape, generator=generator)
            error = (exact.denoise(self.schedule.add_noise(x_0, noise, t), t) - x_0).double().square()
            level = error.flatten(2).mean((0, 2))  # one for each y
            self.table[float(t)] = expand(level, x_0[0]).expand(x_0.shape[1:])

    def initial(self, sample_shape):
        return self.exact.initial(sample_shape)

    def denoise(self, x_t, t):
        return self.exact.denoise(x_t, t)

    def denoiser_error(self, t):
        return self.table[float(t)]


def oracle_ess(exact: ExactProblem, y: Tensor, n: int, generator) -> Tensor | None:
    """Known where the exact posterior is a chain."""
    if not isinstance(exact, LinearProblem):
        return None
    paths = rollout(Oracle(exact.posterior(y), generator), n, y, generator)
    log_w = path_log_prob(exact.prior, paths, 16384) + exact.problem.log_likelihood(paths.x_0, y) - paths.log_prob
    return effective_sample_size(log_w) / n


def train(problem: ExactProblem, method: str, seconds: float, seed: int) -> tuple[Posterior, float, int]:
    """Train for about that many CPU-seconds: the speed of each phase is measured on a few steps first."""
    start_at, options = METHODS[method]

    def fresh() -> Posterior:
        return Posterior(problem.prior, problem.problem, start=start_at)

    if options is None:
        return fresh(), 0.0, 0
    trial = 20
    fit(fresh(), 3, progress=False, **COMMON, **options)
    cost = {}
    for share in (0.0, 1.0):
        start = time.process_time()
        fit(fresh(), trial, progress=False, **COMMON, **{**options, "warm_start": share})
        cost[share] = (time.process_time() - start) / trial
    share = options["warm_start"]
    # `warm_start` is here a share of the time; fit takes a share of the steps
    warm, rtb = int(share * seconds / cost[1.0]), int((1 - share) * seconds / cost[0.0])
    posterior, start = fresh(), time.process_time()
    fit(posterior, warm + rtb, seed, progress=False, **COMMON, **{**options, "warm_start": warm / (warm + rtb)})
    return posterior, time.process_time() - start, warm + rtb


@dataclass
class Reference:
    """What all methods of a problem are compared with, for the same observations."""

    y: Tensor
    exact: Tensor
    floor: Tensor
    oracle: Tensor | None
    log_z: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, problem: ExactProblem, observations: int, n: int, floor_n: int) -> "Reference":
        generator = torch.Generator().manual_seed(12345)
        y = problem.problem.simulate(problem.prior.sample(observations, generator), generator)
        one, two = (problem.draws(y, floor_n, generator) for _ in range(2))
        floor = sliced_wasserstein(one, two, generator=generator)
        return cls(y, one, floor, oracle_ess(problem, y, n, generator), problem.log_evidence(y))


def judge(posterior: Posterior, reference: Reference, n: int) -> dict[str, Estimate | float]:
    generator = torch.Generator().manual_seed(54321)
    draws = importance(posterior, reference.y, n, generator, chunk_size=16384)
    distance = sliced_wasserstein(draws.x[: len(reference.exact)], reference.exact, generator=generator)
    floor, observations = reference.floor, len(reference.y)
    return {
        "distance": Estimate(float(distance.mean() / floor.mean()), float(distance.std() / floor.mean() / observations**0.5)),
        "median distance": float((distance / floor).median()),
        "ess": Estimate.of(draws.ess / n),
        "oracle ess": float("nan") if reference.oracle is None else Estimate.of(reference.oracle),
        "log z error": float((draws.log_z - reference.log_z).abs().median()),
        "elbo gap": Estimate.of(reference.log_z - draws.log_w.mean(0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+", default=["gmm2", "gmm10", "gmm40", "abs2"], choices=list(EXACT_PROBLEMS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--observations", type=int, default=32)
    parser.add_argument("--output", type=Path, help="also write the rows here, as JSON lines")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of further training options, for studies")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    COMMON.update(args.options)
    print(
        "| problem | method | seed | SW / floor | median | ESS / n | oracle's ESS / n | median log Z error | log Z - ELBO | steps | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in args.problems:
        problem = exact_problem(name)
        reference = Reference.of(problem, args.observations, n=2048, floor_n=1024)
        for method in args.methods:
            for seed in range(1 if METHODS[method][1] is None else args.seeds):
                posterior, seconds, steps = train(problem, method, args.seconds, seed)
                row = judge(posterior, reference, n=2048)
                cells = [name, method, seed, row["distance"], f"{row['median distance']:.2f}", row["ess"], row["oracle ess"]]
                cells += [f"{row['log z error']:.3f}", row["elbo gap"], steps, f"{seconds:.0f}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
                if args.output:
                    plain = {key: value.__dict__ if isinstance(value, Estimate) else value for key, value in row.items()}
                    with args.output.open("a") as file:
                        file.write(json.dumps({"problem": name, "method": method, "seed": seed, "seconds": seconds, **plain}) + "\n")


if __name__ == "__main__":
    main()
