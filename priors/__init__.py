"""Concrete priors: a diffusers model, an exact Gaussian and an exact mixture of them, and shipped weights."""

from priors.diffusers_prior import DiffusersPrior
from priors.digits_data import DigitsData, digits, held_out_digits
from priors.gaussian import GaussianPrior
from priors.mixture import GaussianMixture, GaussianMixturePrior

__all__ = ["DiffusersPrior", "DigitsData", "GaussianMixture", "GaussianMixturePrior", "GaussianPrior", "digits", "held_out_digits"]
