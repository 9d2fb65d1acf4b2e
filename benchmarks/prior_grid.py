"""A grid of draws of a shipped prior, with two rows of what it learned from below: python benchmarks/prior_grid.py priors/digits"""

import sys
from pathlib import Path

import torch

from priors import DiffusersPrior, DigitGenerator, LatentPrior, digits, galaxies, held_out_digits, mnist, phantoms
from rtb_inverse.plots import image_grid

DATA = {
    "digits": lambda g: digits()[0][:32],
    "digits_vae": lambda g: held_out_digits()[:32],
    "digits_gan": lambda g: held_out_digits()[:32],
    "galaxies": lambda g: galaxies(32, g),
    "mnist_latent": lambda g: mnist("../shared/data", "test")[0][:32],
    "phantoms": lambda g: phantoms(32, g),
}

if __name__ == "__main__":
    folder, generator = Path(sys.argv[1]), torch.Generator().manual_seed(0)
    load = LatentPrior if (folder / "vae").is_dir() else DiffusersPrior
    prior = DigitGenerator.prior(folder) if folder.name in ("digits_vae", "digits_gan") else load.from_pretrained(folder)
    with torch.no_grad():
        draws = prior.decode(prior.sample(96 if folder.name == "digits" else 64, generator)).clamp(-1, 1)
    image_grid(torch.cat([draws, DATA[folder.name](generator)]), folder / "samples.png")
