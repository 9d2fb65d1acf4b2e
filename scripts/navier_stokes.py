"""Where did this flow come from? The vorticity at time 0 from a few noisy sensors at time T, and how sure one can be.

    python scripts/navier_stokes.py [--n 16] [--time 1] [--noise-std 0.1] [--draws 512] [--observations 4] [--reference 2000] [--seed 0]
        [--output FOLDER]

Draws of the guided posterior (no training needed here), corrected by SMC; the evidence; and 32 preconditioned Crank-Nicolson chains about
the Laplace approximation (`--reference` steps after half as many of burn-in, half of them from its draws, 1.5 times as wide, and half from
ours; 0: none). One line, means over observations with standard errors; report.txt, and navier_stokes.png of the first. Two minutes, with
the chains eight. (About the prior: R-hat 5 after 8,000.)
"""

import argparse
import time
from pathlib import Path

import torch

from priors import RandomField
from rtb_inverse import Posterior, importance, rollout, smc
from rtb_inverse.baselines import pcn
from rtb_inverse.diagnostics import Estimate, sliced_wasserstein
from rtb_inverse.evaluation import report_to
from rtb_inverse.plots import plt
from tasks import NavierStokes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
for name, default in {"n": 16, "time": 1.0, "noise-std": 0.1, "draws": 512, "observations": 4, "reference": 2000, "seed": 0}.items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
o = parser.add_argument("--output", type=Path, default=Path("outputs/navier_stokes")) and parser.parse_args()
generator, say = torch.Generator().manual_seed(o.seed), report_to(o.output)
prior = RandomField(o.n)
problem = NavierStokes((1, o.n, o.n), time=o.time, steps=max(8, int(o.time * o.n / 2)), factor=o.n // 8, noise_std=o.noise_std)
x = prior.decode(prior.sample(o.observations, generator))
y = problem.simulate(x, generator)

start, posterior = time.perf_counter(), Posterior(prior, problem)
plain = importance(posterior, y, o.draws, generator, progress=True)
rate = plain.log_w.numel() / (time.perf_counter() - start)
times = [f"{rate:.0f} draws a second of {posterior.steps} evaluations of the denoiser"]
draws = smc(posterior, y, o.draws, generator, progress=True)
found = {"log Z by importance": plain.log_z, "by SMC": draws.log_z, "ELBO": plain.log_w.mean(0), f"ESS of {o.draws}": plain.ess}
found["chi² per sensor"] = problem.residual(draws.x, y).square().flatten(2).mean((0, 2))
columns = {"true w(0)": x, "w(T)": problem.flow(x), "sensors": y, "posterior mean": draws.mean, "posterior std": draws.std}
columns |= {f"draw {k}": draws.resample(1, generator).x[0] for k in (1, 2)}
if o.reference:
    start, ends = time.perf_counter(), posterior.guide.law(y, 1.5).sample((16,), generator)
    ends, long = torch.cat([ends, rollout(posterior, 16, y, generator).x_0]), {"steps": o.reference, "burn_in": (o.reference + 1) // 2}
    chains = pcn(prior, problem, y, 32, generator, law="laplace", start=ends, kept=min(16, o.reference), progress=True, **long)
    known, std = chains.x.mean(0), chains.x.std(0)
    n = min(o.draws, len(chains.x)) // 2
    sets = draws.resample(n, generator).x, chains.x[::2][:n], chains.x[1::2][:n]
    ours, floor = (torch.stack([sliced_wasserstein(a[:, b], sets[1][:, b]) for b in range(len(y))]) for a in (sets[0], sets[2]))
    found["mean, off by posterior stds"] = ((draws.mean - known) / std).square().flatten(1).mean(1).sqrt()
    found |= {"std, of the chains'": (draws.std / std).flatten(1).mean(1), "sliced Wasserstein, of the floor": ours / floor}
    found |= {"R-hat of the chains": chains.info["r_hat"], "their effective draws": chains.info["effective_draws"]}
    columns["mean of the chains"] = known
    times.append(f"chains of {(time.perf_counter() - start) / len(y):.0f} s a y")
say("; ".join([*(f"{name} {Estimate.of(value)}" for name, value in found.items()), *times]))

fig, axes = plt.subplots(2, 4, figsize=(12, 6), dpi=150, layout="constrained")
plt.setp(axes, xticks=[], yticks=[], frame_on=False)
for ax, (title, image) in zip(axes.flat, columns.items(), strict=False):
    style = {"cmap": "viridis", "vmin": 0} if "std" in title else {"cmap": "RdBu_r", "vmin": -2.5, "vmax": 2.5}
    shown = ax.imshow(image[0, 0], origin="lower", interpolation="nearest" if title == "sensors" else "bicubic", **style)
    ax.set_title(title)
    fig.colorbar(shown, ax=ax, shrink=0.85, pad=0.02).outline.set_visible(False)
fig.savefig(o.output / "navier_stokes.png")
