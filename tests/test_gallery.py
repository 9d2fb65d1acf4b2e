"""The gallery draws every task, and says so where it has no prior to draw from."""

import pytest
import torch

from tasks import MRI, Colourisation, CompressedSensing, Deblurring, Denoising, PhaseRetrieval, SuperResolution, Tomography
from tasks.gallery import EXAMPLES, gallery, main, science, tiled

OF_EXAMPLES = {Colourisation, CompressedSensing, Deblurring, Denoising, MRI, PhaseRetrieval, SuperResolution, Tomography}
OF_OTHERS = {"ClassConstraint", "CoherentDiffraction", "InverseScattering", "Lensing", "LowDoseCT", "NavierStokes"}


def test_it_draws_every_example(tmp_path, generator):
    gallery(torch.rand((2, 1, 16, 16), generator=generator) * 2 - 1, tmp_path / "gallery.png")
    assert (tmp_path / "gallery.png").stat().st_size > 10_000
    assert {type(make(torch.Size((1, 16, 16)))) for make in EXAMPLES.values()} >= OF_EXAMPLES


def test_it_has_the_class_and_the_problems_of_science(tmp_path):
    """In a block below the others, each on draws of its own prior."""
    drawn = science(1)
    assert {type(problem).__name__ for problem, _ in drawn.values()} == OF_OTHERS
    gallery(torch.zeros((1, 1, 8, 8)), tmp_path / "gallery.png", {}, drawn)
    assert (tmp_path / "gallery.png").stat().st_size > 10_000


def test_channels_are_laid_side_by_side():
    channels = torch.arange(3.0)[:, None, None].expand(3, 2, 2)
    found = tiled(channels)
    assert found.shape == (1, 5, 5)
    assert found[0, 0, 0] == 0 and found[0, 0, 3] == 1 and found[0, 3, 0] == 2
    assert found[0, 2].isnan().all() and found[0, :, 2].isnan().all() and found[0, 3:, 3:].isnan().all()


def test_it_wants_a_prior(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no prior in the folder '.*nothing', expected one of grey images"):
        main(str(tmp_path / "nothing"))
