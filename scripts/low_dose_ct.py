"""Computed tomography from few photons and few angles: what can be known of the body, and how surely?

    python scripts/low_dose_ct.py [--prior priors/phantoms] [--angles 16] [--arc 180] [--photons 200] [--draws 32] [--observations 3]
        [--steps 0] [--truth simulator] [--zeta 0.003 ...] [--seed 0] [--output FOLDER]

Counts of phantoms (--truth prior, or another prior: of its own draws). Draws of the guided posterior (fitted first for so many --steps),
the same corrected by SMC, DPS, and filtered back-projection (FBP). One line of numbers, means over the observations with their standard
errors, FOLDER/report.txt and low_dose_ct.png. Of several --zeta, DPS's step sizes, that of the least CRPS on 3 other phantoms, 16 draws
each, is taken.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch

from priors import DiffusersPrior, phantoms
from rtb_inverse import Posterior, fit, importance, smc
from rtb_inverse.baselines import dps, tuned_zeta
from rtb_inverse.diagnostics import Estimate, psnr
from rtb_inverse.evaluation import judge, report_to
from rtb_inverse.plots import plt
from tasks import LowDoseCT

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options = {"prior": "priors/phantoms", "angles": 16, "arc": 180.0, "photons": 200.0, "draws": 32, "observations": 3, "steps": 0}
for name, default in (options | {"seed": 0, "output": Path("outputs/low_dose_ct")}).items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
parser.add_argument("--truth", choices=("simulator", "prior"), default="simulator")
o = parser.add_argument("--zeta", type=float, nargs="+", default=[0.003]) and parser.parse_args()
output, say, simulated = o.output, report_to(o.output), Path(o.prior).name == "phantoms" and o.truth == "simulator"
g, n, prior = torch.Generator().manual_seed(o.seed), o.draws, DiffusersPrior.from_pretrained(o.prior)
x = phantoms(o.observations + 3, g, prior.shape[-1]) if simulated else prior.sample(o.observations + 3, g)
problem = LowDoseCT(prior.shape, o.angles, o.arc, o.photons)
y, posterior = problem.simulate(x, g), Posterior(prior, problem)
(x, others), (y, of_others) = x.tensor_split([-3]), y.tensor_split([-3])
posterior = fit(posterior, o.steps, o.seed) if o.steps else posterior
fbp, found, line = problem.condition(y), [], ""
zeta = tuned_zeta(prior, problem, others, of_others, o.zeta, 16, g, True) if len(o.zeta) > 1 else o.zeta[0]
for name, sample in (
    (f"posterior ({posterior.evaluations()} network evaluations)", partial(importance, posterior, y, n, g, progress=True)),
    (f"SMC ({posterior.evaluations() + prior.steps} a particle)", partial(smc, posterior, y, n, g, progress=True)),
    (f"DPS ({prior.steps}; zeta {zeta:g})", partial(dps, prior, problem, y, n, g, zeta=zeta, progress=True)),
):
    z, said = judge(problem, sample, y, x, g, name.startswith("posterior"))
    found, line = [*found, z], f"{line}; {name}: {said}"
say(f"FBP: psnr {Estimate.of(psnr(fbp, x))}{line}")
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
