"""A body seen by waves that scatter more than once: what can be known of it, and what does it cost to believe the linear (Born) model?

    python scripts/scattering.py [--prior priors/phantoms] [--contrast 0.05 0.5] [--wavelengths 3] [--noise 0.03] [--grid 16] [--draws 16]
        [--observations 2] [--steps 15] [--truth simulator] [--zeta 1 3 10] [--seed 0] [--solver direct] [--output FOLDER]

Noisy fields (--solver deepinv: by its iterations, slowly) of phantoms (--truth prior, or another prior: of its draws) on a coarser --grid.
Draws and evidence by guided posteriors of Born's model and of theirs; DPS and linear inversion, tuned on 3 others. Report and picture.
"""

import argparse
from functools import partial

import torch

from priors import DiffusersPrior, phantoms
from rtb_inverse import InverseProblem, Posterior, importance
from rtb_inverse.baselines import dps, tuned_zeta
from rtb_inverse.diagnostics import Estimate, psnr
from rtb_inverse.evaluation import judge, report_to
from rtb_inverse.guidance import affine
from rtb_inverse.noise import ComplexGaussianNoise
from rtb_inverse.plots import plt
from tasks import InverseScattering

MODELS, parser = ("born", "lippmann_schwinger"), argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
options = {"prior": "priors/phantoms", "output": "outputs/scattering", "wavelengths": 3.0, "noise": 0.03, "grid": 16, "draws": 16}
for name, default in (options | {"observations": 2, "steps": 15, "seed": 0, "solver": "direct"}).items():
    parser.add_argument(f"--{name}", type=type(default), default=default)
parser.add_argument("--contrast", type=float, nargs="+", default=[0.05, 0.5])
parser.add_argument("--truth", choices=("simulator", "prior"), default="simulator")
o = parser.add_argument("--zeta", type=float, nargs="+", default=[1.0, 3.0, 10.0]) and parser.parse_args()
g, prior, n, B = torch.Generator().manual_seed(o.seed), DiffusersPrior.from_pretrained(o.prior, o.steps), o.draws, o.observations + 3
x = phantoms(B, g, prior.shape[-1]) if "phantoms" in o.prior and o.truth == "simulator" else prior.sample(B, g)
say, pool, (truth, others) = report_to(o.output), torch.nn.AdaptiveAvgPool2d(o.grid), x.tensor_split([-3])


def linear(y, born, weight):  # m + B' (B B' + weight)^{-1} (y - A(m)), with B and A of Born's model and m a mean grey
    (B, offset), m = affine(born), others.mean()
    misfit = torch.linalg.solve(B @ B.T + weight * torch.eye(len(B)), (y.flatten(1) - offset - B.sum(1) * m).T.double())
    return (m + misfit.T @ B).reshape(-1, *prior.shape).float()


plt.style.use(["dark_background", {"axes.edgecolor": "black"}])
fig, axes = plt.subplots(len(o.contrast), 8, figsize=(15, 2.15 * len(o.contrast)), dpi=150, layout="constrained", squeeze=False)
wave, body = {"cmap": "berlin", "interpolation": "bicubic", "vmin": -1.5, "vmax": 1.5}, {"cmap": "bone", "vmin": -1, "vmax": 1}
for contrast, row in zip(o.contrast, axes, strict=True):
    waves = [InverseScattering((1, o.grid, o.grid), 8, 24, contrast, o.wavelengths, m, solver=o.solver) for m in MODELS]
    by_born, clean = (model(pool(x)) for model in waves)
    rms, (g_k, _, v) = float(clean.square().sum(-1).mean().sqrt()), waves[1].matrices(x)
    born, problem = (InverseProblem(torch.nn.Sequential(pool, m), ComplexGaussianNoise(o.noise * rms), prior.shape) for m in waves)
    y, of_others = problem.simulate(x, g).tensor_split([-3])
    weight = max((10.0**k * rms**2 for k in range(-6, 3)), key=lambda w: psnr(linear(of_others, born, w), others).mean())
    zeta, posterior = tuned_zeta(prior, problem, others, of_others, [z / rms for z in o.zeta], 8, g, True), Posterior(prior, problem)
    u = torch.linalg.solve(torch.eye(len(g_k)) - g_k * contrast * (pool(truth[0]).flatten() + 1) / 2, v)[:, 0].real
    shown = {"truth": truth, "a wave in it": u.reshape(1, 1, o.grid, -1), "linear inversion": linear(y, born, weight)}
    line, off = f"linear inversion: psnr {Estimate.of(psnr(shown['linear inversion'], truth))}", (by_born - clean).norm() / clean.norm()
    for name, sample in {
        "posterior of Born": partial(importance, Posterior(prior, born), y, n, g, progress=True),
        "DPS": partial(dps, prior, problem, y, n, g, zeta=zeta, progress=True),
        "posterior mean": partial(importance, posterior, y, n, g, progress=True),
    }.items():
        z, said = judge(problem, sample, y, truth, proposal=name != "DPS")
        line, shown = f"{line}; {name}: {said}", shown | {name: z.mean(0)}
    say(f"contrast {contrast:g}, Born {off:.0%} off; {line}; {posterior.evaluations()} evaluations, DPS {o.steps}, zeta {zeta * rms:.3g}")
    for ax, (title, image) in zip(row, (shown | {"posterior std": z.std(0), "draw": z[0]}).items(), strict=True):
        ax.imshow(image[0, 0], aspect="auto", **{"a wave in it": wave, "posterior std": {"cmap": "magma", "vmin": 0}}.get(title, body))
        title, label = title if ax in axes[0] else "", f"contrast {contrast:g}" if ax is row[0] else ""
        ax.set(title=title, ylabel=label, box_aspect=1, xticks=[], yticks=[])
fig.savefig(f"{o.output}/scattering.png")
