"""Inverse problems, one file each."""

from tasks.ambiguous import AmbiguousObjects
from tasks.class_constraint import ClassConstraint, ClassReward
from tasks.colourisation import Colourisation
from tasks.compressed_sensing import CompressedSensing
from tasks.deblurring import Deblurring
from tasks.denoising import Denoising
from tasks.diffraction import CoherentDiffraction
from tasks.exact import ExactProblem, exact_problem
from tasks.hdr import HDR
from tasks.inpainting import Inpainting
from tasks.lensing import Lensing
from tasks.lensing_family import LensingFamily
from tasks.low_dose_ct import LowDoseCT
from tasks.mri import MRI
from tasks.navier_stokes import NavierStokes
from tasks.phase_retrieval import PhaseRetrieval
from tasks.quantisation import Quantisation
from tasks.saturating_deblurring import SaturatingDeblurring
from tasks.scattering import InverseScattering
from tasks.super_resolution import SuperResolution
from tasks.tomography import Tomography

__all__ = [
    "HDR", "MRI", "AmbiguousObjects", "ClassConstraint", "ClassReward", "CoherentDiffraction", "Colourisation", "CompressedSensing",
    "Deblurring", "Denoising", "ExactProblem", "Inpainting", "InverseScattering", "Lensing", "LensingFamily", "LowDoseCT", "NavierStokes",
    "PhaseRetrieval", "Quantisation", "SaturatingDeblurring", "SuperResolution", "Tomography", "exact_problem",
]  # fmt: skip
