"""Between the start of a warm start and its end: python benchmarks/line_search.py [--lr 1e-3] [--steps 400] [--shares 0 0.2 ...]

Box inpainting of 8x8 digits, noise_std 0.1: a guided posterior is trained on simulated pairs, without the line search, and judged at
theta = theta_start + s (theta_end - theta_start) for several shares s:

    EUBO, paired    its change from s = 0 on 256 paths of pairs that no training saw, with the standard error of the paired difference
    the others      over 64 other observations, 16 draws each

One thread; prints Markdown.
"""

import argparse

import torch
from torch import Generator

from priors import DiffusersPrior
from rtb_inverse import Posterior, Trajectory, evaluate, fit, rollout, simulate_observations
from rtb_inverse.diagnostics import Estimate
from rtb_inverse.training import score
from tasks import Inpainting

COLUMNS = ("elbo", "eubo", "log_z_is", "log_likelihood", "psnr", "crps", "coverage_90")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0])
    o = parser.parse_args()
    torch.set_num_threads(1)
    prior = DiffusersPrior.from_pretrained("priors/digits")
    posterior = Posterior(prior, Inpainting(shape=prior.shape, mask="box", noise_std=0.1))
    generator = Generator().manual_seed(777)
    x = rollout(prior, 256, None, generator).x.transpose(1, 2)  # one path for each of 256 observations
    paths = Trajectory(x, prior.times, posterior.problem.simulate(prior.decode(x[-1, 0]), generator))
    held = simulate_observations(posterior, 64, Generator().manual_seed(12))
    start = [parameter.clone() for parameter in posterior.trainable()]
    with torch.enable_grad():
        fit(posterior, o.steps, 0, warm_start=1.0, lr=o.lr, line_search=False, bounds=0, progress=False)
    end = [parameter.clone() for parameter in posterior.trainable()]

    def at(s: float) -> torch.Tensor:
        for parameter, first, last in zip(posterior.trainable(), start, end, strict=True):
            parameter.copy_(torch.lerp(first, last, s))
        log_q, log_p, log_lik = score(posterior, paths, 1024)
        return (log_p + log_lik - log_q)[0]

    before = at(0.0)
    print(f"{o.steps} steps at lr {o.lr:g}\n\n| share | EUBO, paired | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}")
    for s in o.shares:
        change = Estimate.of(at(s) - before)
        found = evaluate(posterior, held, 16, Generator().manual_seed(13)).numbers
        print(f"| {s:g} | {change} | {' | '.join(str(found[name]) for name in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
