"""What the demo reports, from every start: python benchmarks/digits_inpainting.py [--steps 500] [--observations 64] [--draws 64]

Box inpainting of the 8x8 digits (48 of 64 pixels seen, noise_std 0.1, 20 steps). Judged on observations simulated from the prior's own
draws and on real held-out digits: evidence bounds, importance-sampled log Z, effective sample size, log-likelihood of the draws,
PSNR of the posterior mean (data range 2), coverage of the pixel-wise 90 % intervals. The gap of a row is its distance to the best
estimate of log Z of the table: the largest importance-sampled one (itself a lower bound on average).
"""

import argparse
import logging
import time
import warnings

import torch

from priors import DiffusersPrior, held_out_digits
from rtb_inverse import Posterior, evaluate, fit, observe, simulate_observations
from tasks import Inpainting

ROWS = {
    "prior": ("prior", None),
    "guided, untrained": ("guided", None),
    "guided, warm start only": ("guided", {"warm_start": 1.0}),
    "guided, warm start and RTB with backtracking": ("guided", {}),
    "guided, RTB with backtracking only": ("guided", {"warm_start": 0.0, "step_fraction": 0.25}),
    "prior, warm start and RTB with backtracking": ("prior", {}),
}
COLUMNS = ("elbo", "eubo", "log_z_is", "ess", "log_likelihood", "psnr", "coverage_90")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="optimiser steps of each row")
    parser.add_argument("--observations", type=int, default=64)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    prior = DiffusersPrior.from_pretrained("priors/digits")
    problem = Inpainting(prior.shape, "box", noise_std=0.1)
    print(f"| start and training | observations | {' | '.join(COLUMNS)} | steps | CPU s |")
    print("|---" * (len(COLUMNS) + 4) + "|", flush=True)
    for name in args.rows:
        start, options = ROWS[name]
        posterior, began = Posterior(prior, problem, start=start), time.process_time()
        if options is not None:
            fit(posterior, args.steps, args.seed, progress=False, **options)
        seconds = time.process_time() - began
        generator = torch.Generator().manual_seed(12345)
        sources = {
            "simulated": simulate_observations(posterior, args.observations, generator),
            "real": observe(posterior, held_out_digits()[: args.observations], generator),
        }
        for source, held in sources.items():
            numbers = evaluate(posterior, held, args.draws, generator).numbers
            cells = [str(numbers.get(column, "")) for column in COLUMNS]
            print(f"| {name} | {source} | {' | '.join(cells)} | {args.steps if options is not None else 0} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
