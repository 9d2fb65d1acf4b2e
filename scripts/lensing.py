"""Strong lensing with a known answer: is the source that our posterior reconstructs the one that Bayes' theorem gives?

    python scripts/lensing.py [--size 32] [--pixels 40] [--noise-std 0.1] [--draws 199] [--observations 15] [--zeta 0.3 1 3]
        [--seed 4] [--output FOLDER]

Of a galaxy and --observations draws of a Gaussian-process prior: draws of the guided posterior (no training needed here) and of DPS (the
--zeta of the least CRPS on 2 others) against exact mean, standard deviation and evidence. Means over all with standard errors (coverage:
without the galaxy), report.txt, and lensing.png of the galaxy. Five minutes.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import torch

from priors import GaussianPrior
from priors.galaxies_data import galaxies
from rtb_inverse import Posterior, importance
from rtb_inverse.baselines import dps, tuned
from rtb_inverse.diagnostics import Estimate, interval_coverage
from rtb_inverse.evaluation import report_to
from rtb_inverse.plots import plt
from tasks import Lensing
from tasks.exact import LinearProblem
from tasks.lensing import LENS, critical_curve

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in {"size": 32, "pixels": 40, "noise-std": 0.1, "draws": 199, "observations": 15, "seed": 4}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
parser.add_argument("--zeta", type=float, nargs="+", default=[0.3, 1.0, 3.0])
o = parser.add_argument("--output", type=Path, default=Path("outputs/lensing")) and parser.parse_args()
g, n, say, found = torch.Generator().manual_seed(o.seed), o.draws, report_to(o.output), []
exact = LinearProblem(GaussianPrior.process(o.size, length_scale=3.0), Lensing((1, o.size, o.size), o.pixels, noise_std=o.noise_std))
prior, problem, of = exact.prior, exact.problem, exact.problem.config
x, others = torch.cat([1.5 * (galaxies(8, g, o.size)[6:7] + 1), prior.sample(o.observations, g)]), prior.sample(2, g)
y, of_others, posterior = problem.simulate(x, g), problem.simulate(others, g), Posterior(prior, problem)
std = (known := exact.posterior(y)).covariance.diagonal().sqrt().reshape(x[0].shape).float()
best = tuned(dps, prior, problem, others, of_others, [{"zeta": zeta} for zeta in o.zeta], 8, g, progress=True)
for name, sample in {"posterior": partial(importance, posterior), "DPS": partial(dps, prior, problem, **best)}.items():
    start, draws = time.perf_counter(), sample(y, n, g, progress=True)
    z, seconds = draws.x, (time.perf_counter() - start) / draws.log_w.numel()
    off = [(z.mean(0) - known.mean) / std * n**0.5, (z.std(0) / std - 1) * (2 * n) ** 0.5]  # in standard errors
    numbers = [*(c.square().flatten(1).mean(1).sqrt() for c in off), problem.residual(z, y).square().flatten(2).mean((0, 2))]
    told = (
        "{}, {} steps: mean {} and std {} standard errors from the exact ones, chi² per pixel {}, 90 % intervals cover {}; {:.2g} s a draw"
    )
    say(told.format(name, prior.steps, *map(Estimate.of, [*numbers, interval_coverage(z[:, 1:], x[1:], 0.9)]), seconds))
    found.append(draws)
error = (found[0].log_z - exact.log_evidence(y)).square().mean().sqrt()  # of an exact posterior's path weights, none
say(f"log evidence {Estimate.of(found[0].log_z)}, off by {error:.1g} (root mean square); DPS at zeta {best['zeta']:g}")

critical, caustic = critical_curve(of["image_fov"], **{name: of[name] for name in LENS})
light, noise = {"cmap": "inferno", "vmin": 0, "vmax": float(x[0].max())}, {"cmap": "RdBu_r", "vmin": -4, "vmax": 4}
images = [x, y, found[0].mean, found[0].std, *found[0].x[:2], found[1].mean, problem.residual(found[0].x.mean(0), y)]
titles = ["true source", "observed", "posterior mean", "posterior std", "draw 1", "draw 2", "mean of DPS", "residual / noise"]
plt.style.use("dark_background")
fig, axes = plt.subplots(2, 4, figsize=(12.5, 6.2), dpi=150, layout="constrained")
for ax, title, image, style in zip(axes.flat, titles, images, [light] * 3 + [{"cmap": "viridis"}] + [light] * 3 + [noise], strict=True):
    width, curve = (of["source_fov"], caustic) if image.shape[-1] == o.size else (of["image_fov"], critical)
    shown = ax.imshow(image[0, 0], origin="lower", extent=(-width / 2, width / 2) * 2, **style)
    ax.plot(*curve.T, color="black" if style is noise else "white", lw=1, alpha=0.7)
    ax.set(title=title, xticks=[], yticks=[], xlabel=f"{width:g} arcsec")
    fig.colorbar(shown, ax=ax, shrink=0.9, pad=0.02).outline.set_visible(False)
fig.savefig(o.output / "lensing.png")
