"""A picture of all tasks: x, the observation y laid out as an image, and what the posterior network sees of it: the channels of
condition(y) on the scale of x, and beside them, small, those that say how it was seen (a mask, a class, how much light arrives).

The problems of science have priors of their own, and a block of their own below: galaxies, phantoms, the vorticity of a fluid.

python -m tasks.gallery [prior folder] [file]
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg", force=False)
import matplotlib.pyplot as plt
import torch
from torch import Generator, Size, Tensor, nn

from priors import DiffusersPrior, MNISTClassifier, RandomField
from rtb_inverse.chains import Prior
from rtb_inverse.problems import InverseProblem
from tasks.class_constraint import ClassConstraint
from tasks.colourisation import Colourisation
from tasks.compressed_sensing import CompressedSensing
from tasks.deblurring import Deblurring
from tasks.denoising import Denoising
from tasks.diffraction import CoherentDiffraction
from tasks.hdr import HDR
from tasks.inpainting import Inpainting
from tasks.lensing import Lensing
from tasks.low_dose_ct import LowDoseCT
from tasks.mri import MRI
from tasks.navier_stokes import NavierStokes
from tasks.phase_retrieval import PhaseRetrieval
from tasks.quantisation import Quantisation
from tasks.saturating_deblurring import SaturatingDeblurring
from tasks.scattering import InverseScattering
from tasks.super_resolution import SuperResolution
from tasks.tomography import Tomography

# From the shape of a prior of grey images, (1, H, W), to the problem.
EXAMPLES: dict[str, Callable[[Size], InverseProblem]] = {
    "denoising": lambda shape: Denoising(shape, noise_std=0.5),
    "inpainting, box": lambda shape: Inpainting(shape, "box"),
    "inpainting, half": lambda shape: Inpainting(shape, "half"),
    "inpainting, random": lambda shape: Inpainting(shape, "random", hidden=0.7),
    "inpainting, scratches": lambda shape: Inpainting(shape, "scratches", hidden=0.3),
    "super-resolution, ×2": lambda shape: SuperResolution(shape, 2),
    "super-resolution, ×4": lambda shape: SuperResolution(shape, 4),
    "super-resolution, ×4, area": lambda shape: SuperResolution(shape, 4, "area"),
    "deblurring, Gaussian": lambda shape: Deblurring(shape, "gaussian", std=1.5),
    "deblurring, anisotropic": lambda shape: Deblurring(shape, "anisotropic", std=(3.0, 1.0)),
    "deblurring, motion": lambda shape: Deblurring(shape, "motion", size=15),
    "compressed sensing, Gaussian": lambda shape: CompressedSensing(shape, "gaussian", 0.25),
    "compressed sensing, Hadamard": lambda shape: CompressedSensing(shape, "hadamard", 0.25),
    "compressed sensing, Fourier": lambda shape: CompressedSensing(shape, "fourier", 0.25),
    "tomography, 10 angles": lambda shape: Tomography(shape, 10),
    "tomography, 90 degrees": lambda shape: Tomography(shape, 20, 90.0),
    "MRI, 4×": lambda shape: MRI(shape, 4),
    "colourisation": lambda shape: Colourisation((3, *shape[1:])),
    "deblurring, saturating": lambda shape: SaturatingDeblurring(shape, blur_std=1.5, gain=3.0),
    "high dynamic range": lambda shape: HDR(shape),
    "phase retrieval": lambda shape: PhaseRetrieval(shape),
    "phase retrieval, intensity": lambda shape: PhaseRetrieval(shape, "intensity"),
    "quantisation, 2 bits": lambda shape: Quantisation(shape, bits=2, noise_std=0.3),
}
# Problems that need a prior of their own, the class and those of science: the prior, and from its shape to the problem.
SCIENCE: dict[str, tuple[Callable[[], Prior], Callable[[Size], InverseProblem]]] = {
    "class, by a classifier": (lambda: shipped("mnist"), lambda shape: ClassConstraint(shipped_classifier(), shape)),
    "gravitational lensing": (lambda: shipped("galaxies"), lambda shape: Lensing(shape, 40, sky=-1.0)),
    "CT, 200 photons": (lambda: shipped("phantoms"), lambda shape: LowDoseCT(shape, 16, photons=200.0)),
    "coherent diffraction": (lambda: shipped("phantoms"), lambda shape: CoherentDiffraction(shape)),
    "inverse scattering": (lambda: shipped("phantoms"), lambda shape: InverseScattering(shape, 16, 32, 0.3, 3.0)),
    "Navier-Stokes": (lambda: RandomField(32, variance=0.25), lambda shape: NavierStokes(shape, time=4.0, steps=40)),
}
TINTS = torch.tensor([[0.95, 0.55, 0.2], [0.3, 0.75, 0.95], [0.6, 0.9, 0.4]])


def tinted(x: Tensor) -> Tensor:
    """Grey images in [-1, 1], (B, 1, H, W), in colours, (B, 3, H, W): for tasks on colour images."""
    return TINTS[torch.arange(len(x)) % len(TINTS)][:, :, None, None] * (x + 1) - 1


def shipped(name: str) -> DiffusersPrior:
    """A prior of this repository, by the name of its folder."""
    return DiffusersPrior.from_pretrained(Path(__file__).parents[1] / "priors" / name)


def shipped_classifier() -> MNISTClassifier:
    return MNISTClassifier.from_pretrained(Path(__file__).parents[1] / "priors" / "mnist_classifier")


def science(n: int) -> dict[str, tuple[InverseProblem, Tensor]]:
    """The problems of `SCIENCE`, each with n draws (n, 1, h, w) of its prior."""
    drawn = {}
    for title, (load, make) in SCIENCE.items():
        prior = load()
        drawn[title] = make(prior.data_shape), prior.decode(prior.sample(n, Generator().manual_seed(0)))
    return drawn


def gallery(
    x: Tensor, file: str | Path, examples: dict[str, Callable[[Size], InverseProblem]] = EXAMPLES,
    others: dict[str, tuple[InverseProblem, Tensor]] | None = None,
) -> None:  # fmt: skip
    """Draw every example on every image.

    Args:
        x: grey images in [-1, 1], (B, 1, H, W).
        file: where the picture goes.
        examples: by their titles.
        others: problems on images (B, 1, h, w) of their own, drawn below.
    """
    rows = {title: (make(x.shape[1:]), x) for title, make in examples.items()} | (others or {})
    widths = [1, 1, 1, 0.5, 0.15] * len(x)  # a gap after each image
    size = (2.0 + 0.95 * sum(widths), 0.97 * len(rows) + 0.4)
    fig, axes = plt.subplots(len(rows), len(widths), figsize=size, dpi=110, squeeze=False, gridspec_kw={"width_ratios": widths})
    for ax in axes.flat:
        ax.axis("off")
    for row, (title, (problem, images)) in zip(axes, rows.items(), strict=True):
        truth = images if problem.shape[0] == images.shape[1] else tinted(images)
        y = problem.simulate(truth, Generator().manual_seed(0))
        seen, (condition, further) = problem.picture(y), problem.condition(y).tensor_split([problem.shape[0]], 1)
        known = seen[~seen.isnan()]
        low, high = (float(condition.quantile(q)) for q in (0.05, 0.95))  # a back-projection may go far beyond x
        for b in range(len(x)):
            show(row[5 * b], truth[b], (-1, 1))
            show(row[5 * b + 1], seen[b], (float(known.min()), float(known.max())), aspect="auto")
            show(row[5 * b + 2], condition[b], (min(low, -1), max(high, 1)))
            if further.shape[1]:
                show(row[5 * b + 3], tiled(further[b]), (-1, 1))
        row[0].text(-0.1, 0.5, title, transform=row[0].transAxes, ha="right", va="center", fontsize=9)
    for ax, name in zip(axes[0], ("x", "y", "condition(y)", "", "") * len(x), strict=True):
        ax.set_title(name, fontsize=9)
    fig.tight_layout(pad=0.4, h_pad=0.3, w_pad=0.3)
    fig.savefig(file, bbox_inches="tight", pad_inches=0.08)
    plt.close(fig)


def tiled(channels: Tensor) -> Tensor:
    """Channels (C, h, w) side by side and below one another, with a line between them: one image (1, H, W), NaN where there is none."""
    columns = math.ceil(math.sqrt(len(channels)))
    blank = channels.new_full((-len(channels) % columns, *channels.shape[1:]), math.nan)
    padded = nn.functional.pad(torch.cat([channels, blank]), (0, 1, 0, 1), value=math.nan)
    return torch.cat([torch.cat(list(row), 1) for row in padded.split(columns)])[None, :-1, :-1]


def show(ax, image: Tensor, limits: tuple[float, float], aspect: str = "equal") -> None:
    """One image (C, h, w) in colours where C is 3, else its first channel."""
    low, high = limits
    scaled = ((image - low) / max(high - low, 1e-9)).clamp(0, 1)
    pixels = scaled.permute(1, 2, 0) if len(image) == 3 else scaled[0]
    ax.imshow(pixels.numpy(), plt.get_cmap("gray").with_extremes(bad="#c8b89a"), vmin=0, vmax=1, interpolation="nearest", aspect=aspect)


def main(folder: str = "priors/mnist", file: str = "tasks/gallery.png") -> None:
    """Draw the gallery on three draws of a prior of grey images.

    Raises:
        FileNotFoundError: no prior in `folder`. ValueError: a prior of other images.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"no prior in the folder {folder!r}, expected one of grey images: python -m tasks.gallery FOLDER")
    prior = DiffusersPrior.from_pretrained(folder)
    if len(prior.shape) != 3 or prior.shape[0] != 1:
        raise ValueError(f"the prior in {folder!r} must be one of grey images, (1, H, W), got x of shape {tuple(prior.shape)}")
    gallery(prior.decode(prior.sample(3, Generator().manual_seed(0))), file, others=science(3))


if __name__ == "__main__":
    main(*sys.argv[1:])
