"""Inverse problems, one file each."""

from tasks.colourisation import Colourisation
from tasks.compressed_sensing import CompressedSensing
from tasks.deblurring import Deblurring
from tasks.denoising import Denoising
from tasks.exact import ExactProblem, exact_problem
from tasks.inpainting import Inpainting
from tasks.mri import MRI
from tasks.super_resolution import SuperResolution
from tasks.tomography import Tomography

__all__ = [
    "MRI", "Colourisation", "CompressedSensing", "Deblurring", "Denoising", "ExactProblem", "Inpainting", "SuperResolution", "Tomography",
    "exact_problem",
]  # fmt: skip
