"""A grid of draws of the shipped digits prior, with two rows of training digits below: python benchmarks/digits_grid.py"""

from pathlib import Path

import torch

from priors import DiffusersPrior, digits
from rtb_inverse.plots import image_grid

if __name__ == "__main__":
    prior = DiffusersPrior.from_pretrained("priors/digits")
    draws = prior.sample(96, torch.Generator().manual_seed(0)).clamp(-1, 1)
    image_grid(torch.cat([draws, digits()[0][:32]]), Path("priors/digits/samples.png"))
