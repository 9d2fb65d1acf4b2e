"""Inverse problems, one file each."""

from tasks.inpainting import Inpainting

__all__ = ["Inpainting"]
