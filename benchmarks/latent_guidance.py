"""Posteriors in the latents of an autoencoder, with the likelihood of pixels: python benchmarks/latent_guidance.py [--observations 6]

    y of draws of priors/mnist_latent: a box hidden, and four times fewer pixels each way, at noise 0.1
    ours, untrained: guided by Gauss and Newton through the decoder, or by one gradient step, as where the latents are many; and by SMC
    latent DPS, its step size tuned by CRPS on other observations

Means and standard errors over observations; nominal levels of the intervals in brackets; CPU seconds per draw. One thread; prints Markdown.
"""

import argparse
import time

import torch
from torch import Generator

from priors import LatentPrior
from rtb_inverse import Particles, Posterior, importance, smc
from rtb_inverse.baselines import dps
from rtb_inverse.diagnostics import chi_squared, crps, interval_coverage, interval_level, psnr
from rtb_inverse.guidance import GradientGuidance
from tasks import Inpainting, SuperResolution

ZETAS = (0.1, 0.3, 1.0, 3.0)


def row(name: str, draws: Particles, problem, x, y, seconds: float, bounds: bool) -> str:
    z = draws.resample(generator=Generator().manual_seed(2)).x if "SMC" in name else draws.x
    known = [problem.log_likelihood(z, y).mean(0), *((draws.log_w.mean(0), draws.log_z) if bounds else (None, draws.log_z))]
    known = known if bounds or "SMC" in name else [known[0], None, None]
    known += [psnr(z.mean(0), x), crps(z, x), chi_squared(problem.residual(z, y)).reduced, interval_coverage(z, x, 0.9)]
    cells = ["" if v is None else f"{v.mean():.3g} ± {v.std() / len(v) ** 0.5:.2g}" for v in known]
    return f"| {name} | {' | '.join(cells)} ({interval_level(len(z), 0.9):.3f}) | {seconds / z.shape[:2].numel():.2g} |"


def ways(prior, problem, posterior: Posterior, plain: Posterior, y, n: int, zeta: float) -> dict:
    """Whether there are bounds of the evidence, and how to draw."""

    def seeded() -> Generator:
        return Generator().manual_seed(1)

    return {
        "ours, Gauss-Newton": (True, lambda: importance(posterior, y, n, seeded())),
        "ours, one gradient step": (True, lambda: importance(plain, y, n, seeded())),
        "ours, SMC": (False, lambda: smc(posterior, y, n, seeded())),
        f"latent DPS, {prior.steps} steps, zeta {zeta:g}": (False, lambda: dps(prior, problem, y, n, seeded(), zeta=zeta)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observations", type=int, default=6)
    parser.add_argument("--draws", type=int, default=8)
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

        def best(zeta: float, problem=problem, others=others, theirs=theirs) -> float:
            return float(crps(dps(prior, problem, theirs, n, Generator().manual_seed(1), zeta=zeta).x, others).mean())

        zeta, posterior, plain = min(ZETAS, key=best), Posterior(prior, problem), Posterior(prior, problem)
        plain.guide = GradientGuidance(problem, 1, decode=prior.decode, event_dim=len(prior.shape))
        truth = problem.log_likelihood(x, y)
        print(f"\n#### {title}\n\nLog-likelihood of the truth {truth.mean():.0f} ± {truth.std() / len(truth) ** 0.5:.1f}.\n")
        print("| | log-likelihood | ELBO | log Z | PSNR | CRPS | chi² | coverage | CPU s |\n|---|---|---|---|---|---|---|---|---|")
        for name, (bounds, sample) in ways(prior, problem, posterior, plain, y, n, zeta).items():
            start = time.process_time()
            draws = sample()
            print(row(name, draws, problem, x, y, time.process_time() - start, bounds), flush=True)


if __name__ == "__main__":
    main()
