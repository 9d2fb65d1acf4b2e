"""Inverse problems, one file each."""

from tasks.exact import ExactProblem, exact_problem
from tasks.inpainting import Inpainting

__all__ = ["ExactProblem", "Inpainting", "exact_problem"]
