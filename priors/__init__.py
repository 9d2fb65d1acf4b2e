"""Concrete priors: diffusers models of pixels or latents, exact Gaussians and mixtures of them, generators x = f(z); shipped weights."""

from priors.diffusers_prior import DiffusersPrior
from priors.digit_generators import DigitGenerator
from priors.digits_data import DigitsData, digits, held_out_digits
from priors.galaxies_data import GalaxyData, galaxies
from priors.gaussian import GaussianPrior
from priors.generator import GeneratorPrior
from priors.latent import LatentPrior
from priors.mixture import GaussianMixture, GaussianMixturePrior
from priors.mnist_classifier import MNISTClassifier
from priors.mnist_data import MNISTData, mnist
from priors.phantoms_data import PhantomData, phantoms
from priors.random_field import RandomField

__all__ = [
    "DiffusersPrior",
    "DigitGenerator",
    "DigitsData",
    "GalaxyData",
    "GaussianMixture",
    "GaussianMixturePrior",
    "GaussianPrior",
    "GeneratorPrior",
    "LatentPrior",
    "MNISTClassifier",
    "MNISTData",
    "PhantomData",
    "RandomField",
    "digits",
    "galaxies",
    "held_out_digits",
    "mnist",
    "phantoms",
]
