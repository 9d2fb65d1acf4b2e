"""Concrete priors: diffusers models of pixels or latents, exact Gaussians and mixtures of them, generators x = f(z); shipped weights."""

from priors.diffusers_prior import DiffusersPrior
from priors.digits_data import DigitsData, digits, held_out_digits
from priors.gaussian import GaussianPrior
from priors.generator import GeneratorPrior
from priors.latent import LatentPrior
from priors.mixture import GaussianMixture, GaussianMixturePrior
from priors.mnist_classifier import MNISTClassifier
from priors.mnist_data import MNISTData, mnist

__all__ = [
    "DiffusersPrior",
    "DigitsData",
    "GaussianMixture",
    "GaussianMixturePrior",
    "GaussianPrior",
    "GeneratorPrior",
    "LatentPrior",
    "MNISTClassifier",
    "MNISTData",
    "digits",
    "held_out_digits",
    "mnist",
]
