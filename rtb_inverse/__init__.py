"""Posterior sampling for Bayesian inverse problems with diffusion priors, by Relative Trajectory Balance."""

from rtb_inverse.chains import Chain, Prior, Trajectory, path_log_prob, renoise, rollout
from rtb_inverse.corrections import importance, refine, renoise_mcmc, smc
from rtb_inverse.data import ObservationData
from rtb_inverse.evaluation import Observations, Report, evaluate, observe, simulate_observations
from rtb_inverse.lightning import PosteriorTraining, fit
from rtb_inverse.noise import (
    BernoulliNoise,
    ComplexGaussianNoise,
    CorrelatedGaussianNoise,
    GaussianNoise,
    LaplaceNoise,
    LogNormalNoise,
    NegativeBinomialNoise,
    PoissonGaussianNoise,
    PoissonNoise,
    QuantisedNoise,
    StudentTNoise,
)
from rtb_inverse.noise_range import NoiseRange
from rtb_inverse.particles import Particles
from rtb_inverse.posterior import Posterior
from rtb_inverse.prior_training import PriorTraining
from rtb_inverse.problems import InverseProblem, Reward
from rtb_inverse.schedules import FlowMatching, Schedule, VarianceExploding, VariancePreserving, schedule_from_config

__all__ = [
    "BernoulliNoise", "Chain", "ComplexGaussianNoise", "CorrelatedGaussianNoise", "FlowMatching", "GaussianNoise", "InverseProblem",
    "LaplaceNoise", "LogNormalNoise", "NegativeBinomialNoise", "NoiseRange", "ObservationData", "Observations", "Particles",
    "PoissonGaussianNoise", "PoissonNoise", "Posterior", "PosteriorTraining", "Prior", "PriorTraining", "QuantisedNoise", "Report",
    "Reward", "Schedule", "StudentTNoise", "Trajectory", "VarianceExploding", "VariancePreserving", "evaluate", "fit", "importance",
    "observe", "path_log_prob", "refine", "renoise", "renoise_mcmc", "rollout", "schedule_from_config", "simulate_observations", "smc",
]  # fmt: skip
