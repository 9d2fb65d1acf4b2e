"""What the covariance at the very state adds to the guided start, and what the draws that the prior keeps do:

    python benchmarks/second_look.py [--prior priors/mnist] [--tasks ...] [--looks one two "two, references"]

Untrained posteriors with and without `second_look`, and with `references`, the same observations (simulated from the prior), numbers with
standard errors over them; evaluations of the network and draws per second of one thread. Prints Markdown.
"""

import argparse
import time

import torch
from torch import Generator

from priors import DiffusersPrior, LatentPrior
from rtb_inverse import Posterior, evaluate, simulate_observations
from rtb_inverse.diagnostics import Estimate, interval_level
from tasks.gallery import EXAMPLES

TASKS = ("inpainting, box", "super-resolution, ×4", "phase retrieval", "deblurring, saturating")
WAYS = {
    "one": {"second_look": False, "references": False},
    "two": {"second_look": True, "references": False},
    "two, references": {"second_look": True, "references": True},
}
COLUMNS = ("elbo", "log_z_is", "eubo", "log_likelihood", "psnr", "crps", "chi_squared", "coverage_90")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prior", default="priors/digits")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(EXAMPLES))
    parser.add_argument("--observations", type=int, default=24)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--looks", nargs="+", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    prior = (LatentPrior if "latent" in args.prior else DiffusersPrior).from_pretrained(args.prior)
    print(f"90 % intervals of {args.draws} draws cover {interval_level(args.draws, 0.9):.3f}.\n")
    print(f"| problem (log-likelihood of the truth) | looks | evaluations | {' | '.join(COLUMNS)} | draws per second |")
    print("|---" * (len(COLUMNS) + 4) + "|")
    for task in args.tasks:
        for looks in args.looks:
            posterior = Posterior(prior, EXAMPLES[task](prior.data_shape), **WAYS[looks])
            held = simulate_observations(posterior, args.observations, Generator().manual_seed(12345))
            numbers = evaluate(posterior, held, args.draws, Generator().manual_seed(54321)).numbers
            start = time.process_time()
            posterior.sample(held.y[:4], 8, Generator().manual_seed(0))
            speed = 4 * 8 / (time.process_time() - start)
            evaluations = posterior.evaluations()
            truth = Estimate.of(posterior.problem.log_likelihood(held.x, held.y))
            title = f"{task} ({truth})" if looks == args.looks[0] else ""
            cells = " | ".join(str(numbers[name]) for name in COLUMNS)
            print(f"| {title} | {looks} | {evaluations} | {cells} | {speed:.2g} |", flush=True)


if __name__ == "__main__":
    main()
