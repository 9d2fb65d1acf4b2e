"""Computed tomography from few photons and few angles: what can be known of the body, and how surely?

    python scripts/low_dose_ct.py [--prior priors/phantoms] [--angles 16] [--arc 180] [--photons 200] [--draws 32] [--observations 3]
        [--steps 0] [--zeta 0.003] [--seed 0] [--output FOLDER]

Counts of phantoms (for another prior, of its own draws). Draws of the guided posterior (fitted first for so many --steps), the same
corrected by SMC, DPS of step size zeta, and filtered back-projection (FBP). One line of numbers, and FOLDER/low_dose_ct.png.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from priors import DiffusersPrior, phantoms
from rtb_inverse import Posterior, fit, smc
from rtb_inverse.baselines import dps
from rtb_inverse.checks import check_writable
from rtb_inverse.diagnostics import chi_squared, crps, interval_coverage, interval_level, psnr
from rtb_inverse.plots import plt
from tasks import LowDoseCT

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options = {"prior": "priors/phantoms", "angles": 16, "arc": 180.0, "photons": 200.0, "draws": 32, "observations": 3, "steps": 0}
for name, default in (options | {"zeta": 0.003, "seed": 0, "output": Path("outputs/low_dose_ct")}).items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
o = parser.parse_args()
output = check_writable("output", o.output)
g, n, prior = torch.Generator().manual_seed(o.seed), o.draws, DiffusersPrior.from_pretrained(o.prior)
x = prior.sample(o.observations, g) if Path(o.prior).name != "phantoms" else phantoms(o.observations, g, prior.shape[-1])
problem = LowDoseCT(prior.shape, o.angles, o.arc, o.photons)
y, posterior = problem.simulate(x, g), Posterior(prior, problem)
posterior = fit(posterior, o.steps, o.seed) if o.steps else posterior
fbp, found, line = problem.condition(y), [], ""
for name, evaluations, sample in (
    ("posterior", prior.steps, lambda: posterior.sample(y, n, g, progress=True)),
    ("SMC", 2 * prior.steps, lambda: smc(posterior, y, n, g, progress=True).resample(generator=g)),
    ("DPS", prior.steps, lambda: dps(prior, problem, y, n, g, zeta=o.zeta, progress=True)),
):
    start = time.perf_counter()
    found.append(z := sample().x)
    seconds = (time.perf_counter() - start) / (n * len(y))
    chi2, covered = chi_squared(problem.residual(z, y)).reduced.mean(), interval_coverage(z, x, 0.9).mean()
    line += f"; {name}: PSNR {psnr(z.mean(0), x).mean():.1f}, CRPS {crps(z, x).mean():.3f}, chi² {chi2:.2f}, "
    line += f"{interval_level(n, 0.9):.0%} intervals cover {covered:.0%}, {evaluations} network evaluations and {seconds:.2g} s per draw"
print(f"FBP: PSNR {psnr(fbp, x).mean():.1f}{line}")
(z, _, guess), body = found, {"cmap": "bone", "vmin": -1, "vmax": 1}
titles = ["truth", "photons", "FBP", "posterior mean", "posterior std", "draw 1", "draw 2", "mean of DPS"]
columns = [x, y, fbp, z.mean(0), z.std(0), z[0], z[1], guess.mean(0)]
plt.style.use("dark_background")
fig, axes = plt.subplots(len(x), 8, figsize=(13.6, 1.68 * len(x) + 0.3), dpi=150, layout="constrained", squeeze=False)
for (row, k), ax in np.ndenumerate(axes):
    ax.axis("off")
    ax.imshow(columns[k][row, 0], aspect="auto", **{1: {"cmap": "viridis"}, 4: {"cmap": "magma", "vmin": 0}}.get(k, body))
    ax.set(title=titles[k] if row == 0 else "", box_aspect=1)
fig.savefig(output / "low_dose_ct.png")
