"""Coherent diffraction imaging: photon counts do not say where an object lies, nor which way round. Do the draws know?

    python scripts/diffraction.py [--photons 100] [--std 0.05] [--background 0.1] [--draws 128] [--observations 6] [--rounds 2]
        [--steps 40] [--seed 0] [--output FOLDER]

Three letters, each at four places and both ways round: the posterior has eight modes of known, unequal shares. Draws of the guided
posterior without training, corrected by SMC or `refine`, and DPS. TV: total variation distance of one observation's shares from the exact
ones (so many exact draws have some, too); p: of a test of their means (`clustered_p_value`). One line, and FOLDER/diffraction.png.
"""

import argparse
import time
from pathlib import Path

import torch

from rtb_inverse import Particles, Posterior, refine, smc
from rtb_inverse.baselines import dps
from rtb_inverse.diagnostics import Estimate, clustered_p_value
from rtb_inverse.evaluation import report_to
from rtb_inverse.plots import plt
from tasks import AmbiguousObjects

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
options = {"photons": 100.0, "std": 0.05, "background": 0.1, "draws": 128, "observations": 6, "rounds": 2, "steps": 40, "seed": 0}
for name, default in (options | {"output": Path("outputs/diffraction")}).items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
o = parser.parse_args()
output, say, n, B = o.output, report_to(o.output), o.draws, o.observations
exact = AmbiguousObjects.letters(o.std, o.steps, photons=o.photons, background=o.background)
g, prior, problem, known = torch.Generator().manual_seed(o.seed), exact.prior, exact.problem, 3 * exact.prior.log_weights.exp()[:8]
found, x = {}, prior.sample(B, g)
y, truth = problem.simulate(x, g), exact.shares(Particles(x[None], torch.zeros(1, B))).argmax(1) // 8
posterior, line = Posterior(prior, problem), f"{float(y.flatten(1).sum(1).mean()):.0f} counts"
ways = {
    "exact": lambda: Particles(exact.draws(y, n, g), torch.zeros(n, B)),
    "guided": lambda: posterior.sample(y, n, g, progress=True),
    "SMC": lambda: smc(posterior, y, n, g, progress=True),
    "refined": lambda: refine(posterior, y, n, g, rounds=o.rounds, candidates=2, progress=True),
} | {f"DPS {z:g}": lambda z=z: dps(prior, problem, y, n, g, zeta=z, progress=True) for z in (0.001, 0.003, 0.01, 0.03)}  # fmt: skip
for name, sample in ways.items():
    start, draws = time.perf_counter(), sample()
    seconds, shares = (time.perf_counter() - start) / (n * B), exact.shares(draws).unflatten(1, (3, 8))[torch.arange(B), truth]
    tv, right = ((shares - known).abs().sum(1) + 1 - shares.sum(1)) / 2, shares.sum(1, keepdim=True)
    found[name], cost = (draws, shares, float(tv.mean())), draws.info.get("evaluations", 0 if name == "exact" else o.steps)
    line += f"; {name}: TV {Estimate.of(tv)}, p {clustered_p_value(shares / right, known):.2g}, wrong object "
    line += f"{1 - right.mean():.3f}, chi² {problem.residual(draws.x, y).square().mean():.2f}, {cost:.0f} evaluations, {seconds:.2g} s"
gap = found["SMC"][0].log_z - exact.log_evidence(y)
say(f"{line}; all per draw; log evidence by SMC off by {Estimate.of(gap)}")

best, draws = min((name for name in ways if "DPS" in name), key=lambda name: found[name][2]), found["refined"][0].x[:, 0]
mode = torch.cdist(draws, prior.means).argmin(1) - 8 * truth[0]
images = {"truth": x[0], "counts (log)": exact.diffraction.picture(y[:1])}
images |= {f"draw, mode {j + 1}": torch.cat([draws[mode == j], torch.full_like(draws[:1], torch.nan)])[0] for j in range(8)}
images |= {"mean": draws.mean(0), "std": draws.std(0)}
plt.style.use("dark_background")
fig, axes = plt.subplot_mosaic([[*images][:10], [*images][10:] + 8 * ["shares"]], figsize=(15, 3.6), dpi=150, layout="constrained")
for title, image in images.items():
    style = {"counts (log)": {"cmap": "inferno"}, "std": {"cmap": "magma", "vmin": 0}}.get(title, {"cmap": "bone", "vmin": -1, "vmax": 1})
    axes[title].imshow(image.reshape(10, 10), **style), axes[title].set(title=title, xticks=[], yticks=[])
for k, (name, colour) in enumerate({"exact": "#d8d8d8", "guided": "#5b7fd6", "refined": "#35c2a8", best: "#f2695c"}.items()):
    shares, at = known.expand(B, 8) if name == "exact" else found[name][1], torch.arange(8) + 0.2 * (k - 1.5)
    axes["shares"].bar(at, shares.mean(0), 0.18, yerr=shares.std(0) / B**0.5, color=colour, label=name, ecolor="white")
axes["shares"].set(xlim=(-0.5, 7.5), xticks=range(8), xticklabels=range(1, 9), xlabel="mode", ylabel="share")
axes["shares"].legend(ncols=4, frameon=False), axes["shares"].spines[["top", "right"]].set_visible(False)
fig.savefig(output / "diffraction.png")
