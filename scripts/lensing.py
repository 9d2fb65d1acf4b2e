"""Strong lensing with a known answer: is the source that our posterior reconstructs the one that Bayes' theorem gives?

    python scripts/lensing.py [--size 32] [--pixels 40] [--noise-std 0.1] [--draws 400] [--observations 16] [--seed 4] [--output FOLDER]

Of a lensed galaxy under a Gaussian-process prior: draws of the guided posterior (no training needed here) against exact mean, standard
deviation and evidence, and against DPS; coverage of sources drawn from the prior. One line, report.txt and lensing.png. Two minutes.
"""

import argparse
import time
from pathlib import Path

import torch

from priors import GaussianPrior
from priors.galaxies_data import galaxies
from rtb_inverse import Posterior, importance
from rtb_inverse.baselines import dps
from rtb_inverse.diagnostics import interval_coverage
from rtb_inverse.evaluation import report_to
from rtb_inverse.plots import plt
from tasks import Lensing
from tasks.exact import LinearProblem
from tasks.lensing import shoot

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in {"size": 32, "pixels": 40, "noise-std": 0.1, "draws": 400, "observations": 16, "seed": 4}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
o = parser.add_argument("--output", type=Path, default=Path("outputs/lensing")) and parser.parse_args()
generator, n, kind, say = torch.Generator().manual_seed(o.seed), o.draws, {"progress": True}, report_to(o.output)
exact = LinearProblem(GaussianPrior.process(o.size, length_scale=3.0), Lensing((1, o.size, o.size), o.pixels, noise_std=o.noise_std))
prior, problem, of = exact.prior, exact.problem, exact.problem.config

x = 1.5 * (galaxies(8, generator, o.size)[6:7] + 1)
y = problem.simulate(x, generator)
known, posterior, start = exact.posterior(y), Posterior(prior, problem), time.perf_counter()
draws, seconds = importance(posterior, y, n, generator, **kind), (time.perf_counter() - start) / n
guess, truths = dps(prior, problem, y, n, generator, **kind).x, prior.sample(o.observations, generator)
covered = interval_coverage(posterior.sample(problem.simulate(truths, generator), 199, generator, **kind).x, truths, 0.9)

std = known.covariance.diagonal().sqrt().reshape(x.shape).float()
off = [((z.mean(0) - known.mean) / std * n**0.5).square().mean().sqrt() for z in (draws.x, guess)]  # in standard errors
wide = [((z.std(0) / std - 1) * (2 * n) ** 0.5).square().mean().sqrt() for z in (draws.x, guess)]
say(
    f"mean {off[0]:.2f} and std {wide[0]:.2f} standard errors from the exact ones (DPS {off[1]:.1f}, {wide[1]:.1f}); log evidence "
    f"{draws.log_z[0]:.3f} ± {draws.log_z_error[0]:.1g}, exact {exact.log_evidence(y)[0]:.3f}; chi² per pixel "
    f"{problem.residual(draws.x, y).square().mean():.3f} (DPS {problem.residual(guess, y).square().mean():.3f}); 90 % intervals cover "
    f"{covered.mean():.3f} ± {covered.std() / len(covered) ** 0.5:.3f} of {len(covered)}; {prior.steps} evaluations, {seconds:.2g} s a draw"
)

axis = torch.linspace(-of["image_fov"], of["image_fov"], 401, dtype=torch.float64) / 2
lens = [of[name] for name in ("einstein_radius", "axis_ratio", "angle", "centre", "shear")]
beta = shoot(torch.cartesian_prod(axis, axis), *lens).reshape(401, 401, 2)
(a, b), (c, d) = (torch.gradient(beta[..., k], spacing=(axis, axis)) for k in (0, 1))
curves = plt.contour(axis, axis, (a * d - b * c).T, [0]).allsegs[0]  # where the magnification is infinite
critical = torch.from_numpy(max(curves, key=len))
light, noise = {"cmap": "inferno", "vmin": 0, "vmax": float(x.max())}, {"cmap": "RdBu_r", "vmin": -4, "vmax": 4}
images = [x, y, draws.mean, draws.std, draws.x[0], draws.x[1], guess.mean(0), problem.residual(draws.mean, y)]
titles = ["true source", "observed", "posterior mean", "posterior std", "draw 1", "draw 2", "mean of DPS", "residual / noise"]
plt.style.use("dark_background")
fig, axes = plt.subplots(2, 4, figsize=(12.5, 6.2), dpi=150, layout="constrained")
for ax, title, image, style in zip(axes.flat, titles, images, [light] * 3 + [{"cmap": "viridis"}] + [light] * 3 + [noise], strict=True):
    width, curve = (of["source_fov"], shoot(critical, *lens)) if image.shape[-1] == o.size else (of["image_fov"], critical)
    shown = ax.imshow(image[0, 0], origin="lower", extent=(-width / 2, width / 2) * 2, **style)
    ax.plot(*curve.T, color="black" if style is noise else "white", lw=1, alpha=0.7)
    ax.set(title=title, xticks=[], yticks=[], xlabel=f"{width:g} arcsec")
    fig.colorbar(shown, ax=ax, shrink=0.9, pad=0.02).outline.set_visible(False)
fig.savefig(o.output / "lensing.png")
