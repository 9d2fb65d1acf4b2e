"""How much of the gap that the warm start leaves is closed by RTB with backtracking, or by as long a warm start:

    python benchmarks/digits_long.py [--seconds 3600] [--ways rtb warm] [--options '{"lr_rtb": 3e-5}'] [--threads 1]

The demo's problem, judged on 64 observations simulated from the prior, 128 draws each, the same for all rows.
"""

import argparse
import copy
import json
import logging
import time
import warnings

import torch

from priors import DiffusersPrior
from rtb_inverse import Posterior, evaluate, fit, simulate_observations
from tasks import Inpainting

WAYS = {"rtb": {"warm_start": 0.0, "step_fraction": 0.25, "observations": 8, "draws": 16}, "warm": {"warm_start": 1.0, "pool": 65536}}
COLUMNS = ("elbo", "eubo", "log_z_is", "ess", "log_likelihood", "psnr", "coverage_90")


def timed_fit(posterior: Posterior, steps: int, **options) -> float:
    start = time.process_time()
    fit(posterior, steps, progress=False, **options)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600.0, help="CPU seconds of each way")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--warm-steps", type=int, default=500)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of further training options of the ways")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    prior = DiffusersPrior.from_pretrained("priors/digits")
    posterior = Posterior(prior, Inpainting(prior.shape, "box", noise_std=0.1))
    held = simulate_observations(posterior, 64, torch.Generator().manual_seed(12345))
    print(f"| training | {' | '.join(COLUMNS)} | steps | CPU s |\n" + "|---" * (len(COLUMNS) + 3) + "|", flush=True)

    def show(name: str, judged: Posterior, steps: int, seconds: float) -> None:
        numbers = evaluate(judged, held, 128, torch.Generator().manual_seed(54321)).numbers
        print(f"| {name} | {' | '.join(str(numbers[column]) for column in COLUMNS)} | {steps} | {seconds:.0f} |", flush=True)

    show("untrained", posterior, 0, 0.0)
    seconds = timed_fit(posterior, args.warm_steps, warm_start=1.0)
    show("warm start", posterior, args.warm_steps, seconds)
    for way in args.ways:
        options = {"seed": 1, **WAYS[way], **args.options}
        setup, trial = (timed_fit(copy.deepcopy(posterior), steps, **options) for steps in (1, 21))
        steps = max(1, int((args.seconds - setup) / (trial - setup) * 20))
        trained = copy.deepcopy(posterior)
        seconds = timed_fit(trained, steps, **options)
        show(f"and {'RTB with backtracking' if way == 'rtb' else 'more of it, fresh paths'}", trained, steps, seconds)


if __name__ == "__main__":
    main()
