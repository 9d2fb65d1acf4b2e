"""Posterior sampling for Bayesian inverse problems with diffusion priors, by Relative Trajectory Balance."""

from rtb_inverse.chains import Chain, Prior, Trajectory, path_log_prob, renoise, rollout
from rtb_inverse.corrections import importance, refine, renoise_mcmc, smc
from rtb_inverse.data import ObservationData
from rtb_inverse.evaluation import Observations, Report, evaluate, observe, simulate_observations
from rtb_inverse.lightning import PosteriorTraining, fit
from rtb_inverse.particles import Particles
from rtb_inverse.posterior import Posterior
from rtb_inverse.prior_training import PriorTraining
from rtb_inverse.problems import GaussianNoise, InverseProblem, Reward
from rtb_inverse.schedules import FlowMatching, Schedule, VarianceExploding, VariancePreserving, schedule_from_config

__all__ = [
    "Chain", "FlowMatching", "GaussianNoise", "InverseProblem", "ObservationData", "Observations", "Particles", "Posterior",
    "PosteriorTraining", "Prior", "PriorTraining", "Report", "Reward", "Schedule", "Trajectory", "VarianceExploding",
    "VariancePreserving", "evaluate", "fit", "importance", "observe", "path_log_prob", "refine", "renoise", "renoise_mcmc", "rollout",
    "schedule_from_config", "simulate_observations", "smc",
]  # fmt: skip
