"""Posteriors in the latents of an autoencoder, with the likelihood of pixels:

    python benchmarks/latent_guidance.py [--observations 6] [--steps 400]

    y of draws of priors/mnist_latent: a box hidden, and four times fewer pixels each way, at noise 0.1
    ours, trained from the prior's own chain on simulated pairs and, for a twentieth of --steps, by RTB
    ours, untrained: guided by Gauss and Newton through the decoder, or by one gradient step, as where the latents are many, with and
        without the draws that the prior keeps; and by SMC
    latent DPS, and PSLD, which glues the latent to what its image encodes to; step sizes tuned by CRPS on other observations

Means and standard errors over observations; nominal levels of the intervals in brackets; CPU seconds per draw. One thread; prints Markdown.
"""

import argparse
import time
from functools import partial

import torch
from torch import Generator, Tensor

from priors import LatentPrior
from rtb_inverse import Particles, Posterior, fit, importance, smc
from rtb_inverse.baselines import dps, psld, tuned
from rtb_inverse.diagnostics import Estimate, interval_level
from rtb_inverse.evaluation import scores
from rtb_inverse.guidance import GradientGuidance
from tasks import Inpainting, SuperResolution

ZETAS = (0.1, 0.3, 1.0, 3.0)
GAMMAS = (0.03, 0.1, 0.3)
METHODS = (
    ("latent DPS", dps, [{"zeta": zeta} for zeta in ZETAS]),
    ("PSLD", psld, [{"zeta": zeta, "gamma": gamma} for zeta in ZETAS for gamma in GAMMAS]),
)
TRAINING = {"warm_start": 0.95, "states": 64, "draws": 4, "observations": 4, "step_fraction": 0.25, "pool_start": 1024, "bounds": 0}
TRAINING |= {"line_search": False}


def row(name: str, problem, draws: Particles, y: Tensor, x: Tensor, seconds: float) -> str:
    """Of draws with their weights; those of SMC are resampled, and only path weights bound the evidence."""
    z = draws.resample(generator=Generator().manual_seed(2)).x if "SMC" in name else draws.x
    of = {key: str(Estimate.of(value)) for key, value in scores(problem, z, y, x).items()}
    rival = "zeta" in name
    if not rival:
        of["log Z"] = str(Estimate.of(draws.log_z))
    if not rival and "SMC" not in name:
        of["ELBO"] = str(Estimate.of(draws.log_w.mean(0)))
    level, each = f"{interval_level(len(z), 0.9):.3f}", seconds / draws.log_w.numel()
    cells = (of.get(key, "") for key in ("log_likelihood", "ELBO", "log Z", "psnr", "crps", "chi_squared", "coverage_90"))
    return f"| {name} | {' | '.join(cells)} ({level}) | {each:.2g} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", type=int, default=6)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--steps", type=int, default=0, help="of training; 0: none")
    parser.add_argument("--rivals", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ours", action=argparse.BooleanOptionalAction, default=True)
    o = parser.parse_args()
    torch.set_num_threads(1)
    prior, n = LatentPrior.from_pretrained("priors/mnist_latent"), o.draws
    shape = prior.data_shape
    for title, problem in (
        ("box inpainting", Inpainting(shape, "box", noise_std=0.1)),
        ("super-resolution ×4", SuperResolution(shape, 4, noise_std=0.1)),
    ):
        generator = Generator().manual_seed(0)
        x = prior.decode(prior.sample(o.observations + 3, generator))
        y = problem.simulate(x, generator)
        (others, x), (theirs, y) = x.split([3, o.observations]), y.split([3, o.observations])
        rivals, ours = {}, {}
        for name, method, grid in METHODS if o.rivals else ():
            best = tuned(method, prior, problem, others, theirs, grid, n, Generator().manual_seed(1))
            label = ", ".join(f"{key} {value:g}" for key, value in best.items())
            rivals[f"{name}, {prior.steps} steps, {label}"] = partial(method, prior, problem, **best)
        print(f"\n#### {title}\n\nLog-likelihood of the truth {Estimate.of(problem.log_likelihood(x, y))}.\n")
        print("| | log-likelihood | ELBO | log Z | PSNR | CRPS | chi² | coverage | CPU s |\n|---|---|---|---|---|---|---|---|---|")
        if o.ours:
            posterior, plain, step, told = (Posterior(prior, problem, references=kept) for kept in (True, False, False, False))
            step.guide = told.guide = GradientGuidance(problem, 1, decode=prior.decode, event_dim=len(prior.shape))
            told.hold_references(prior.draws).measure(prior, problem, lambda *state, told=told: told.denoise(*state)[0])
            ours = {
                "ours, Gauss-Newton": partial(importance, posterior),
                "the same, no references": partial(importance, plain),
                "ours, one gradient step": partial(importance, told),
                "the same step, no references": partial(importance, step),
                "ours, SMC": partial(smc, posterior),
            }
        if o.steps:
            posterior = Posterior(prior, problem, start="prior")
            with torch.enable_grad():
                fit(posterior, o.steps, 0, progress=False, **TRAINING)
            ours |= {f"ours, trained for {o.steps} steps": partial(importance, posterior), "the same, SMC": partial(smc, posterior)}
        for name, sample in (ours | rivals).items():
            start, draws = time.process_time(), sample(y, n, Generator().manual_seed(1))
            print(row(name, problem, draws, y, x, time.process_time() - start), flush=True)


if __name__ == "__main__":
    main()
