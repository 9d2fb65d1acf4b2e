"""One posterior for many lenses: what is known of each galaxy behind its own, where it is seen once and where several times?

    python scripts/lensing_galaxies.py [--prior priors/galaxies] [--pixels 32] [--noise-std 0.1] [--draws 12] [--observations 4]
        [--zeta 0.003 ...] [--seed 0] [--output FOLDER]

Of new galaxies (for another prior, its own draws): the guided posterior, untrained, the same corrected by SMC, and DPS, whose --zeta of the
least CRPS on 2 others is taken. Means over the observations with standard errors, of all pixels of the source, and of those of one image or
several: connected sets of rays from a pixel, a ring counts as two. FOLDER/lensing_galaxies.png: inside the white line several are seen.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import label

from priors import DiffusersPrior, galaxies
from rtb_inverse import Posterior, smc
from rtb_inverse.baselines import dps
from rtb_inverse.diagnostics import chi_squared, crps, interval_coverage, interval_level, psnr
from rtb_inverse.plots import plt
from tasks import Lensing, LensingFamily
from tasks.lensing import shoot

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options = {"prior": "priors/galaxies", "pixels": 32, "noise-std": 0.1, "draws": 12, "observations": 4, "seed": 0}
for name, default in (options | {"output": Path("outputs/lensing_galaxies")}).items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
o = parser.add_argument("--zeta", type=float, nargs="+", default=[3e-3]) and parser.parse_args()
o.output.mkdir(parents=True, exist_ok=True)
g, n, B, R, prior = torch.Generator().manual_seed(o.seed), o.draws, o.observations, 400, DiffusersPrior.from_pretrained(o.prior)
family = LensingFamily(Lensing(prior.shape, o.pixels, centre=(0.2, 0.1), image_fov=2.8, noise_std=o.noise_std, sky=-1.0), (0.4, 0.7))
x = galaxies(B + 66, g, prior.shape[-1]) if Path(o.prior).name == "galaxies" else prior.sample(B + 66, g)
(x, others, known), found = x.split([B, 2, 64]), []  # the last say how wide the prior is
y, of_others, posterior, of = family.simulate(x, g), family.simulate(others, g), Posterior(prior, family), family.operator.config
size, axis, several = x.shape[-1], of["image_fov"] * torch.linspace(-0.5, 0.5, R).double(), torch.zeros_like(x[:, 0], dtype=torch.bool)
for mask, (b, q, angle, *shear) in zip(several, family.split(y)[1].double().tolist(), strict=True):
    beta = shoot(torch.cartesian_prod(axis, axis).flip(1), b, q, angle, of["centre"], shear).reshape(R, R, 2) / of["source_fov"]
    pixel = torch.where(beta.abs().amax(-1) < 0.5, ((beta + 0.5) * size).floor() @ axis.new_tensor([1, size]), -1).numpy()
    mask[:] = torch.tensor([label(pixel == p, np.ones((3, 3)))[1] + label(pixel != p)[1] > 2 for p in range(size**2)]).view_as(mask)


def mean(values):
    return f"{values.mean():.3g} ± {values.std() / len(values) ** 0.5:.2g}"


def scores(draws, truth, std):
    return psnr(draws.mean(0), truth), crps(draws, truth), 100 * interval_coverage(draws, truth, 0.9), draws.std(0).mean(), std.mean()


tried = [float(crps(dps(prior, family, of_others, 8, g, zeta=z, progress=True).x, others).mean()) for z in o.zeta]
zeta = o.zeta[tried.index(min(tried))]
print(f"{interval_level(n, 0.9):.0%} intervals; CRPS of DPS on other galaxies:", ", ".join(f"{score:.4f}" for score in tried))
rivals = {"posterior": posterior.sample, "SMC": partial(smc, posterior), f"DPS (zeta {zeta:g})": partial(dps, prior, family, zeta=zeta)}
for name, sample in rivals.items():
    start, draws = time.perf_counter(), sample(y, n, g, progress=True)
    cost = f"{prior.steps * (1 + (name == 'SMC'))} network evaluations and {(time.perf_counter() - start) / (n * B):.2g} s per draw"
    found.append(z := draws.resample(generator=g).x)
    print(f"{name}: chi² {mean(chi_squared(family.residual(z, y)).reduced)}, ESS of the weights {mean(draws.ess)} of {n}, {cost}")
    for region, masks in {"all pixels": several | True, "one image": ~several, "several images": several}.items():
        parts = [scores(z[:, [k], 0][..., m], x[[k], 0][..., m], known[:, 0, m].std(0)) for k, m in enumerate(masks) if m.any()]
        line = "    {} ({:.0%}): PSNR {}, CRPS {}, intervals cover {} %, std {} (of the prior: {})"
        print(line.format(region, masks.double().mean(), *map(mean, torch.tensor(parts).T)))

z, guess, plain, other = found[0], found[2], ("inferno", -1, 1), {1: ("inferno", -0.2, None), 3: ("viridis", 0, None), 7: ("RdBu_r", -4, 4)}
titles = ["true source", "observed", "posterior mean", "posterior std", "draw 1", "draw 2", "mean of DPS", "residual / noise"]
columns = [x, family.picture(y), z.mean(0), z.std(0), z[0], z[1], guess.mean(0), family.residual(z.mean(0, keepdim=True), y)[0]]
plt.style.use("dark_background")
fig, axes = plt.subplots(B, 8, figsize=(13.6, 1.68 * B + 0.3), dpi=150, layout="constrained", squeeze=False)
for (row, k), ax in np.ndenumerate(axes):
    ax.imshow(columns[k][row, 0], origin="lower", **dict(zip(("cmap", "vmin", "vmax"), other.get(k, plain), strict=True)))
    if k == 3:
        ax.contour(several[row], [0.5], colors="white", linewidths=1.2)
    ax.set(title=titles[k] if row == 0 else "", xticks=[], yticks=[])
fig.savefig(o.output / "lensing_galaxies.png")
