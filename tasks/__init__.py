"""Inverse problems, one file each."""

from tasks.class_constraint import ClassConstraint, ClassReward
from tasks.exact import ExactProblem, exact_problem
from tasks.hdr import HDR
from tasks.inpainting import Inpainting
from tasks.phase_retrieval import PhaseRetrieval
from tasks.quantisation import Quantisation
from tasks.saturating_deblurring import SaturatingDeblurring

__all__ = [
    "HDR", "ClassConstraint", "ClassReward", "ExactProblem", "Inpainting", "PhaseRetrieval", "Quantisation", "SaturatingDeblurring",
    "exact_problem",
]  # fmt: skip
