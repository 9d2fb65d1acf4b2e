"""What a pilot is worth to SMC: python benchmarks/twist_powers.py [--prior digits] [--tasks "inpainting, half" ...] [--n 256 --runs 6]

log Z of the same untrained posterior by importance sampling, by SMC with the whole of its twist (`pilot=0`) and with the power that a pilot
measures, with as many network evaluations: n draws, or particles and pilot together. The mean weight is without bias, so that the mean of
log Z falls short of the truth by about half its variance: the higher the mean, and the smaller the spread over runs, the better. Means
and spreads over the observations. One thread; prints Markdown.
"""

import argparse
from collections.abc import Callable

import torch
from class_shares import PROBLEMS
from torch import Generator

from priors import DiffusersPrior
from rtb_inverse import Posterior, importance, simulate_observations, smc
from rtb_inverse.particles import Particles

TASKS = ["inpainting, half", "inpainting, box", "super-resolution, ×4"]


def compare(task: str, prior: DiffusersPrior, o: argparse.Namespace) -> None:
    pilot = o.n // 5
    posterior = Posterior(prior, PROBLEMS[task](prior.shape))
    y = simulate_observations(posterior, o.observations, Generator().manual_seed(12345)).y
    ways: dict[str, Callable[[Generator], Particles]] = {
        f"importance, {o.n} draws": lambda g: importance(posterior, y, o.n, g),
        f"SMC, {o.n} particles, the whole twist": lambda g: smc(posterior, y, o.n, g, pilot=0),
        f"SMC, {o.n - pilot} particles after {pilot}": lambda g: smc(posterior, y, o.n - pilot, g, pilot=pilot),
    }
    for name, run in ways.items():
        log_z = torch.stack([run(Generator().manual_seed(seed)).log_z for seed in range(o.runs)])
        each = ", ".join(f"{v:.1f}" for v in log_z.mean(0).tolist())
        title = task if name.startswith("importance") else ""
        print(f"| {title} | {name} | {float(log_z.mean()):.2f} | {float(log_z.var(0).mean().sqrt()):.2f} | {each} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default="digits", choices=["digits", "mnist"])
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=list(PROBLEMS))
    for name, default in {"n": 256, "runs": 6, "observations": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    o = parser.parse_args()
    torch.set_num_threads(1)
    prior = DiffusersPrior.from_pretrained(f"priors/{o.prior}")
    print("| problem | | log Z | spread over runs | by observation |\n|---|---|---|---|---|")
    for task in o.tasks:
        compare(task, prior, o)


if __name__ == "__main__":
    main()
