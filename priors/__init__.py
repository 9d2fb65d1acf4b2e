"""Concrete priors: a diffusers model, an exact Gaussian mixture, and shipped weights."""

from priors.diffusers_prior import DiffusersPrior
from priors.digits_data import DigitsData, digits, held_out_digits
from priors.mixture import GaussianMixture, GaussianMixturePrior

__all__ = ["DiffusersPrior", "DigitsData", "GaussianMixture", "GaussianMixturePrior", "digits", "held_out_digits"]
