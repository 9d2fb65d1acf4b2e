"""Your forward model, your noise and a pretrained prior: draws of the posterior, whether they are right, and the evidence.

    python scripts/your_forward_model.py [--data y.npy] [--prior priors/digits] [--steps 0] [--observations 32] [--draws 64] [--seed 0]
        [--output FOLDER]

Edit what is under "Yours". y (B, *y_shape) is read from --data; without, four are simulated, and shown beside their truth. With --steps
the guided start is trained first. The report judges the posterior on other --observations, simulated from the prior: bounds of the log
evidence, chi-squared, coverage, two tests of calibration; then, of each y, log Z by SMC. FOLDER/report.txt, a picture, draws.npy.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from priors import DiffusersPrior
from rtb_inverse import InverseProblem, PoissonNoise, Posterior, evaluate, fit, simulate_observations, smc
from rtb_inverse.evaluation import report_to
from rtb_inverse.plots import posterior_panel
from tasks.linear import lay_out

# Yours: any function of a batch, here counts of the light of each row and column
noise = PoissonNoise(gain=50.0, background=1.0)


def operator(x):  # (M, C, H, W) in the prior's range, here [-1, 1], to (M, *y_shape)
    light = ((x + 1) / 2).clamp_min(0)
    return torch.cat([light.mean(2), light.mean(3)], -1)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options = {"prior": "priors/digits", "steps": 0, "observations": 32, "draws": 64, "seed": 0, "output": "outputs/your_forward_model"}
for name, default in options.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
parser.add_argument("--data", type=Path)
o = parser.parse_args()
say, g, prior = report_to(o.output), torch.Generator().manual_seed(o.seed), DiffusersPrior.from_pretrained(o.prior)
posterior = Posterior(prior, InverseProblem(operator, noise))
if o.steps:
    fit(posterior, o.steps, o.seed)
report = evaluate(posterior, simulate_observations(posterior, o.observations, g), o.draws, g, progress=True)
say(f"{o.observations} simulated observations, {o.draws} draws each:\n{report}")
own = None if o.data else simulate_observations(posterior, 4, g)
y = own.y if own else torch.from_numpy(np.load(o.data)).float()
start = time.perf_counter()
draws = posterior.sample(y, o.draws, g, progress=True).x
seconds = (time.perf_counter() - start) / (len(draws) * len(y))
runs = torch.stack([smc(posterior, y, o.draws, g, progress=True).log_z for _ in range(2)])
log_z = ", ".join(f"{mean:.1f} ± {abs(a - b) / 2:.1f}" for mean, (a, b) in zip(runs.mean(0), runs.T, strict=True))
say(f"log Z of each y, of two runs of SMC: {log_z}; {posterior.evaluations()} network evaluations and {seconds:.2g} s a draw")
np.save(f"{o.output}/draws.npy", draws.numpy())
posterior_panel(lay_out(y), draws.mean(0), draws.std(0), draws[:8], f"{o.output}/your_forward_model.png", own.x if own else None)
