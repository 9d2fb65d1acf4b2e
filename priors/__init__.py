"""Concrete priors: a diffusers model, an exact Gaussian, an exact mixture of them, any generator x = f(z); and shipped weights."""

from priors.diffusers_prior import DiffusersPrior
from priors.digits_data import DigitsData, digits, held_out_digits
from priors.gaussian import GaussianPrior
from priors.generator import GeneratorPrior
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
    "MNISTClassifier",
    "MNISTData",
    "digits",
    "held_out_digits",
    "mnist",
]
