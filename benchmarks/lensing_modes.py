"""Has the posterior of a lensed galaxy more than one mode, where it is seen once and where several times?

    python benchmarks/lensing_modes.py [--observations 4] [--draws 64] [--noise-std 0.1]

Draws of the prior `priors/galaxies`, each behind its own lens, and draws of their guided posteriors. Of the pixels that are seen once, and
of those seen several times: along the direction in which draws vary most,

    sharpness    (E|p|)^2 / E p^2 of the centred projections p: 2 / pi = 0.64 for a Gaussian, 3 / 4 for a uniform law, 1 for two points
    p            how often Gaussian draws of the same covariance, their own direction found anew, are as sharp (200 sets)
    lit          share of the draws that have a pixel above -0.5 there (the sky is -1): a clump, a companion, an arm, or none of it

and the standard deviation of the posterior's pixels over that of the prior's. One thread; prints Markdown.
"""

import argparse

import torch
from torch import Generator, Tensor

from priors import DiffusersPrior
from rtb_inverse import Posterior
from tasks import Lensing, LensingFamily

NULL = 200  # sets of Gaussian draws
LIT = -0.5


def sharpness(x: Tensor) -> Tensor:
    """Of draws x (..., N, d): (...)."""
    x = x - x.mean(-2, keepdim=True)
    U, S, _ = torch.linalg.svd(x, full_matrices=False)
    p = U[..., 0] * S[..., :1]
    return p.abs().mean(-1) ** 2 / p.square().mean(-1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"observations": 4, "draws": 64, "noise-std": 0.1}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    o = parser.parse_args()
    torch.set_num_threads(1)
    g, prior = Generator().manual_seed(0), DiffusersPrior.from_pretrained("priors/galaxies")
    family = LensingFamily(Lensing(prior.shape, 32, centre=(0.2, 0.1), image_fov=2.8, noise_std=o.noise_std, sky=-1.0), (0.4, 0.7))
    x, known = prior.sample(o.observations + 64, g).split([o.observations, 64])
    y = family.simulate(x, g)
    several, z = family.several(family.split(y)[1]), Posterior(prior, family).sample(y, o.draws, g).x
    print("| observation | pixels | sharpness | p | lit, % (of the prior; truth) | std, of the prior's |\n|---|---|---|---|---|---|")
    for b in range(o.observations):
        for name, mask in {"one image": ~several[b], "several": several[b]}.items():
            draws, anywhere, truth = (part[..., mask].double() for part in (z[:, b, 0], known[:, 0], x[b, 0]))
            root = (draws - draws.mean(0)).T / len(draws) ** 0.5  # its product with white noise has the draws' covariance
            white = torch.randn((NULL, len(draws), len(draws)), generator=g, dtype=torch.float64)
            p = float((sharpness(white @ root.T) >= sharpness(draws)).double().mean())
            lit = [100 * float((part.amax(-1) > LIT).double().mean()) for part in (draws, anywhere)]
            lit = f"{lit[0]:.0f} ({lit[1]:.0f}; {'lit' if truth.amax() > LIT else 'dark'})"
            wide = float(draws.std(0).mean() / anywhere.std(0).mean())
            print(f"| {b + 1} | {name} | {float(sharpness(draws)):.3f} | {p:.2f} | {lit} | {wide:.2f} |", flush=True)


if __name__ == "__main__":
    main()
