"""Concrete priors: a diffusers model, an exact Gaussian and an exact mixture of them, and shipped weights."""

from priors.diffusers_prior import DiffusersPrior
from priors.digits_data import DigitsData, digits, held_out_digits
from priors.gaussian import GaussianPrior
from priors.mixture import GaussianMixture, GaussianMixturePrior
from priors.mnist_classifier import MNISTClassifier
from priors.mnist_data import MNISTData, mnist

__all__ = [
    "DiffusersPrior",
    "DigitsData",
    "GaussianMixture",
    "GaussianMixturePrior",
    "GaussianPrior",
    "MNISTClassifier",
    "MNISTData",
    "digits",
    "held_out_digits",
    "mnist",
]
