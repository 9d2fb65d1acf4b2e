"""One posterior for many lenses: what is known of each galaxy behind its own, where it is seen once and where several times?

    python scripts/lensing_galaxies.py [--prior priors/galaxies] [--pixels 32] [--noise-std 0.1] [--draws 12] [--observations 4]
        [--truth simulator] [--zeta 0.003 ...] [--spread 30 ...] [--seed 0] [--output FOLDER]

Of new galaxies (--truth prior, or another prior: of its own draws): the guided posterior, untrained, and by SMC, twisted SMC and DPS (of
--spread and --zeta those of the least CRPS on 2 others). Means over observations with standard errors, of all, and of source pixels with
one image and with several. FOLDER/report.txt and lensing_galaxies.png: inside the white line several are seen.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch

from priors import DiffusersPrior, galaxies
from rtb_inverse import Posterior, importance, smc
from rtb_inverse.baselines import dps, tuned, twisted
from rtb_inverse.diagnostics import Estimate, crps, interval_coverage
from rtb_inverse.evaluation import judge, report_to
from rtb_inverse.plots import plt
from tasks import Lensing, LensingFamily

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options = {"prior": "priors/galaxies", "pixels": 32, "noise-std": 0.1, "draws": 12, "observations": 4, "seed": 0}
for name, default in (options | {"output": Path("outputs/lensing_galaxies"), "zeta": [3e-3], "spread": [30.0]}).items():
    many = isinstance(default, list)
    parser.add_argument(f"--{name}", type=float if many else type(default), nargs="+" if many else None, default=default)
o = parser.add_argument("--truth", choices=("simulator", "prior"), default="simulator") and parser.parse_args()
g, n, B = torch.Generator().manual_seed(o.seed), o.draws, o.observations
prior, say = DiffusersPrior.from_pretrained(o.prior), report_to(o.output)
family = LensingFamily(Lensing(prior.shape, o.pixels, centre=(0.2, 0.1), image_fov=2.8, noise_std=o.noise_std, sky=-1.0), (0.4, 0.7))
x = galaxies(B + 66, g, prior.shape[-1]) if Path(o.prior).name == "galaxies" and o.truth == "simulator" else prior.sample(B + 66, g)
(x, others, known), found = x.split([B, 2, 64]), []  # the last say how wide the prior is
y, of_others, posterior = family.simulate(x, g), family.simulate(others, g), Posterior(prior, family)
several = family.several(family.split(y)[1])
tries = (dps, [{"zeta": k} for k in o.zeta]), (twisted, [{"spread": k} for k in o.spread])
zeta, spread = (tuned(f, prior, family, others, of_others, settings, 8, g, progress=True) for f, settings in tries)
for name, sample in {
    f"posterior ({posterior.evaluations()} network evaluations)": partial(importance, posterior, y, n, g, progress=True),
    f"SMC ({posterior.evaluations() + prior.steps} a particle)": partial(smc, posterior, y, n, g, progress=True),
    f"twisted SMC ({prior.steps}; spread {spread['spread']:g})": partial(twisted, prior, family, y, n, g, **spread, progress=True),
    f"DPS ({prior.steps}; zeta {zeta['zeta']:g})": partial(dps, prior, family, y, n, g, **zeta, progress=True),
}.items():
    z, said = judge(family, sample, y, x, g, name.startswith("posterior"))
    found.append(z)
    say(f"{name}: {said}")
    for region, masks in {"one image": ~several, "several images": several}.items():
        parts = [(z[:, [k], 0][..., m], x[[k], 0][..., m], known[:, 0, m].std(0)) for k, m in enumerate(masks)]
        parts = [(crps(v, u)[0], interval_coverage(v, u, 0.9)[0], v.std(0).mean(), std.mean()) for v, u, std in parts]
        numbers = map(Estimate.of, torch.tensor(parts).T)
        say("    {} ({:.0%}): crps {}, coverage_90 {}, std {}, of the prior {}".format(region, masks.double().mean(), *numbers))

z, plain, other = found[0], ("inferno", -1, 1), {1: ("inferno", -0.2, None), 3: ("viridis", 0, None), 7: ("RdBu_r", -4, 4)}
titles = ["true source", "observed", "posterior mean", "posterior std", "draw 1", "draw 2", "mean of DPS", "residual / noise"]
columns = [x, family.picture(y), z.mean(0), z.std(0), z[0], z[1], found[-1].mean(0), family.residual(z.mean(0, keepdim=True), y)[0]]
plt.style.use("dark_background")
fig, axes = plt.subplots(B, 8, figsize=(13.6, 1.68 * B + 0.3), dpi=150, layout="constrained", squeeze=False)
for (row, k), ax in np.ndenumerate(axes):
    ax.imshow(columns[k][row, 0], origin="lower", **dict(zip(("cmap", "vmin", "vmax"), other.get(k, plain), strict=True)))
    if k == 3:
        ax.contour(several[row], [0.5], colors="white", linewidths=1.2)
    ax.set(title=titles[k] if row == 0 else "", xticks=[], yticks=[])
fig.savefig(o.output / "lensing_galaxies.png")
