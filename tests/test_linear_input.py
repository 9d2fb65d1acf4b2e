"""What the linear tasks of imaging refuse, and what their YAMLs build."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from rtb_inverse.guidance import COVARIANCE_LIMIT
from rtb_inverse.posterior import Posterior
from rtb_inverse.problems import InverseProblem
from tasks import MRI, Colourisation, CompressedSensing, Deblurring, Denoising, Inpainting, SuperResolution, Tomography
from tasks.deblurring import motion_kernel

ROOT = Path(__file__).resolve().parents[1]
SHAPE, SHAPE_28 = (1, 8, 8), (1, 28, 28)

BAD = {
    "an even kernel": (lambda: Deblurring(SHAPE, size=4), "size must be odd, so that the kernel has a centre, got 4"),
    "an own even kernel": (lambda: Deblurring(SHAPE, torch.ones(3, 2)), r"both odd, got shape \(3, 2\)"),
    "an own kernel in 3-D": (lambda: Deblurring(SHAPE, torch.ones(3, 3, 3)), r"both odd, got shape \(3, 3, 3\)"),
    "an own kernel with NaN": (lambda: Deblurring(SHAPE, torch.full((3, 3), math.nan)), "kernel must be finite"),
    "an own kernel of zeros": (lambda: Deblurring(SHAPE, torch.zeros(3, 3)), "kernel must have an element that is not 0, got none"),
    "a large kernel": (lambda: Deblurring(SHAPE, size=9), r"kernel must be no larger than the image, \(8, 8\), got \(9, 9\)"),
    "another kernel": (lambda: Deblurring(SHAPE, "box"), "kernel must be one of gaussian, anisotropic, motion, got 'box'"),
    "another boundary": (lambda: Deblurring(SHAPE, size=3, boundary="zeros"), "boundary must be one of reflect, .* got 'zeros'"),
    "no width": (lambda: Deblurring(SHAPE, size=3, std=0.0), "std must be a finite number above 0, got 0.0"),
    "one width of two": (lambda: Deblurring(SHAPE, "anisotropic", size=3, std=1.0), r"std must be a pair \(along, across\).* got 1.0"),
    "no kernel": (lambda: motion_kernel(0), "size must be an integer of at least 1, got 0"),
    "a factor that does not divide": (lambda: SuperResolution(SHAPE, 3), "factor must divide the sides of x, 8 and 8, got 3"),
    "a factor of one": (lambda: SuperResolution(SHAPE, 1), "factor must be an integer of at least 2, got 1"),
    "a factor beyond half of x": (lambda: SuperResolution(SHAPE, 8, "matlab"), "factor must be at most half of the sides of x, 8 and 8"),
    "another method": (lambda: SuperResolution(SHAPE, 2, "nearest"), "method must be one of bicubic, matlab, area, got 'nearest'"),
    "a ratio of 0": (lambda: CompressedSensing(SHAPE, ratio=0.0), r"ratio must be in \(0, 1\], got 0.0"),
    "a ratio above 1": (lambda: CompressedSensing(SHAPE, ratio=1.5), r"ratio must be in \(0, 1\], got 1.5"),
    "a ratio in words": (lambda: CompressedSensing(SHAPE, ratio="half"), r"ratio must be in \(0, 1\], got 'half'"),
    "another kind": (lambda: CompressedSensing(SHAPE, "wavelet"), "kind must be one of gaussian, hadamard, fourier, got 'wavelet'"),
    "no angles": (lambda: Tomography(SHAPE, 0), "angles must be an integer of at least 1, got 0"),
    "no arc": (lambda: Tomography(SHAPE, 5, 0), r"arc must be in \(0, 180\], got 0"),
    "too much of an arc": (lambda: Tomography(SHAPE, 5, 360.0), r"arc must be in \(0, 180\], got 360.0"),
    "an oblong to turn": (lambda: Tomography((1, 8, 6)), r"shape must be \(C, n, n\), got \(1, 8, 6\)"),
    "no acceleration": (lambda: MRI(SHAPE, 0), "acceleration must be between 1 and the 8 columns of x, got 0"),
    "too fast": (lambda: MRI(SHAPE, 9), "acceleration must be between 1 and the 8 columns of x, got 9"),
    "too much in the middle": (lambda: MRI(SHAPE, 4, 0.5), "central must be at most 1 / acceleration, 0.25, got 0.5"),
    "a central share above 1": (lambda: MRI(SHAPE, 1, 1.5), r"central must be in \[0, 1\], got 1.5"),
    "MRI of colours": (lambda: MRI((3, 8, 8)), r"shape must be \(1 or 2, H, W\), got \(3, 8, 8\)"),
    "colours of grey": (lambda: Colourisation(SHAPE), r"shape must be \(3, H, W\), got \(1, 8, 8\)"),
    "scratches on a vector": (lambda: Inpainting((16,), "scratches"), r"shape must be \(C, H, W\), got \(16,\)"),
    "a seed in words": (lambda: CompressedSensing(SHAPE, seed="a"), "seed must be an integer of at least 0, got 'a'"),
    "no seed": (lambda: MRI(SHAPE, 2, seed=None), "seed must be an integer of at least 0, got None"),
    "half a seed": (lambda: Inpainting(SHAPE, "random", seed=1.5), "seed must be an integer of at least 0, got 1.5"),
    "an empty image": (lambda: Denoising((1, 0, 8)), "sizes in shape must be an integer of at least 1, got 0"),
}
CLASSES = {
    Denoising: {}, SuperResolution: {"factor": 2}, Deblurring: {"size": 3}, CompressedSensing: {}, Tomography: {}, MRI: {},
    Colourisation: {"shape": (3, 8, 8)},
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_clear_error(name):
    make, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make, message", [
    (lambda: Deblurring(SHAPE, None), r"kernel must be one of gaussian, .* or an array \(h, w\), got None"),
    (lambda: Deblurring(SHAPE, 1j * torch.ones(3, 3)), "kernel must be real, got torch.complex64"),
    (lambda: Inpainting(SHAPE, None), "mask must be one of box, .* an array or the path of a file, got None"),
])  # fmt: skip
def test_input_of_another_kind_gets_one_clear_error(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("noise_std", [0.0, -1.0, math.nan])
def test_noise_must_be_above_0(cls, noise_std):
    with pytest.raises(ValueError, match="noise_std must be finite and above 0"):
        cls(**{"shape": SHAPE} | CLASSES[cls], noise_std=noise_std)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not Denoising])
@pytest.mark.parametrize("shape", [(8, 8), (64,), 8, (1, 1, 8, 8), "image"])
def test_shape_must_be_that_of_an_image(cls, shape):
    with pytest.raises(ValueError, match=r"shape must be \("):
        cls(**CLASSES[cls] | {"shape": shape})


@pytest.mark.parametrize("shape", [8, "image", ()])
def test_shape_must_be_one(shape):
    with pytest.raises(ValueError, match="shape must be that of x"):
        Denoising(shape)


def test_a_prior_of_other_images_is_refused(make_prior):
    with pytest.raises(ValueError, match=r"problem is for x of shape \(3, 8, 8\), but the prior draws x of shape \(1, 8, 8\)"):
        Posterior(make_prior("unet2d"), Colourisation((3, 8, 8)))
    with pytest.raises(ValueError, match=r"problem is for x of shape \(1, 16, 16\), but the prior draws x of shape \(1, 8, 8\)"):
        Posterior(make_prior("unet2d"), MRI((1, 16, 16)))


# YAML, import


def read(file: str) -> dict:
    return yaml.safe_load((ROOT / "tasks" / file).read_text())


def section(file: str) -> dict:
    return read(file)["model"]["init_args"]["posterior"]["init_args"]["problem"]


NAMES = {f"tasks.{cls.__name__}" for cls in CLASSES}
FILES = sorted(path.name for path in (ROOT / "tasks").glob("*.yaml"))
YAMLS = ["inpainting_scratches.yaml", *(file for file in FILES if section(file)["class_path"] in NAMES)]


def parsed(problem: dict) -> InverseProblem:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(InverseProblem, "problem", fail_untyped=False)  # as the command line reads it
    return parser.instantiate(parser.parse_object({"problem": problem})).problem


def test_every_linear_task_has_a_yaml():
    assert {section(file)["class_path"] for file in YAMLS} == NAMES | {"tasks.Inpainting"}


@pytest.mark.parametrize("file", YAMLS)
def test_yaml_builds_its_problem(file):
    config, template = read(file), read("inpainting_box.yaml")
    arguments = config["model"]["init_args"]
    problem = parsed(section(file))
    assert f"tasks.{type(problem).__name__}" == section(file)["class_path"] and list(problem.shape) == section(file)["init_args"]["shape"]
    assert arguments["output"] == f"outputs/{file.removesuffix('.yaml')}" and f"tasks/{file}" in (ROOT / "tasks" / file).read_text()
    assert config.keys() == template.keys() and config["trainer"].keys() == template["trainer"].keys()
    assert arguments.keys() == template["model"]["init_args"].keys()
    if "priors/mnist" in arguments["posterior"]["init_args"]["prior"]["init_args"].values():
        assert problem.shape == SHAPE_28 and problem.linear
        assert problem.shape.numel() * problem.y_shape.numel() <= COVARIANCE_LIMIT  # the best guide


def test_a_wrong_key_in_a_yaml_fails():
    with pytest.raises(Exception, match="accelleration"):
        parsed({"class_path": "tasks.MRI", "init_args": {"shape": [1, 28, 28], "accelleration": 4}})


def test_tasks_import_without_deepinv():
    done = subprocess.run(
        [sys.executable, "-c", "import sys, tasks; print('deepinv' in sys.modules)"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip() == "False" and done.returncode == 0, done.stderr
