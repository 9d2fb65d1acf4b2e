"""Deblurring: y is the convolution of x with a known kernel. The kernels are functions here, (size, size), of sum 1, for others to use."""

from functools import partial

import torch
from torch import Tensor

from rtb_inverse.checks import check_choice, check_count, check_finite, check_number, check_positive
from rtb_inverse.randomness import made_on_cpu, seeded
from tasks.linear import LinearTask, Physics, image_shape

KERNELS = ("gaussian", "anisotropic", "motion")
BOUNDARIES = ("reflect", "replicate", "circular", "valid")
KEPT = 2**20  # elements of its matrix up to which its products are no slower than convolutions, all derivatives told


def odd_size(size: int) -> int:
    if check_count("size", size) % 2 == 0:
        raise ValueError(f"size must be odd, so that the kernel has a centre, got {size}")
    return size


def gaussian_kernel(size: int, std: float) -> Tensor:
    """A Gaussian of standard deviation `std` pixels, (size, size)."""
    return anisotropic_kernel(size, (check_positive("std", std),) * 2)


def anisotropic_kernel(size: int, std: tuple[float, float] = (3.0, 1.0), angle: float = 45.0) -> Tensor:
    """A Gaussian of standard deviation std[0] pixels along a line and std[1] across it, (size, size). The line is at `angle` degrees to
    the rows, counter-clockwise as one looks at the image."""
    from deepinv.physics.functional import gaussian_blur

    if not isinstance(std, (tuple, list)) or len(std) != 2:
        raise ValueError(f"std must be a pair (along, across) for an anisotropic kernel, got {std!r}")
    along, across = (check_positive("std", s) for s in std)
    kernel = gaussian_blur((odd_size(size),) * 2, (across, along), check_number("angle", angle), dtype=torch.float64)[0, 0]
    return kernel.div(kernel.sum()).float()


@made_on_cpu
def motion_kernel(size: int, seed: int = 0) -> Tensor:
    """The track of a shaken camera, (size, size): both coordinates are draws of a Gaussian process with a Matérn covariance (Schuler et al.
    2015, arXiv 1406.7444), the same for the same seed."""
    from deepinv.physics.generator import MotionBlurGenerator

    kernel = MotionBlurGenerator((odd_size(size),) * 2, rng=seeded(seed)).step()["filter"][0, 0]
    return kernel / kernel.sum()


def read_kernel(kernel) -> Tensor:
    """A kernel that the user gave, as it is: a tensor, an array or nested lists (h, w), both sides odd."""
    try:
        kernel = torch.as_tensor(kernel)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"kernel must be one of {', '.join(KERNELS)} or an array (h, w), got {kernel!r}") from error
    if kernel.is_complex():
        raise TypeError(f"kernel must be real, got {kernel.dtype}")
    kernel = kernel.float()
    if kernel.ndim != 2 or any(n % 2 == 0 for n in kernel.shape):
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)} or have shape (h, w), both odd, got shape {tuple(kernel.shape)}")
    if not check_finite("kernel", kernel).any():
        raise ValueError("kernel must have an element that is not 0, got none: it would see nothing")
    return kernel


def convolution(kernel: Tensor, boundary: str, shape: torch.Size) -> Physics:
    """Of every channel with one kernel (h, w): (M, C, H, W) to itself, or smaller by h - 1 and w - 1 where "valid"."""
    from deepinv.physics import Blur

    return Physics(partial(Blur, kernel[None, None], padding=boundary), shape, KEPT, kernel=kernel)


class Deblurring(LinearTask):
    """y = kernel * x + noise_std n, every channel for itself.

    Args:
        shape: of x, (C, H, W).
        kernel: "gaussian", "anisotropic", "motion" (see the functions of these names), or one of your own (h, w), convolved as it is.
        size: of the kernel, odd, no larger than the image.
        std: of the Gaussian, in pixels; of the anisotropic one, the pair along and across.
        angle: of the anisotropic one, in degrees. seed: of the motion.
        boundary: what lies around the image. "reflect": its mirror image (about the centre of the border's pixels), "replicate": the
            border's pixels again, "circular": the image again; y is then (B, C, H, W). "valid": nothing is assumed, and y has only the
            pixels whose kernel lies inside the image, (B, C, H - h + 1, W - w + 1).
        noise_std: standard deviation of the noise, > 0, in the units of x (whose range is the prior's own, usually [-1, 1]).

    Raises:
        ValueError: a kernel that is even-sized, larger than the image or of another name; std <= 0; another boundary; a shape that is not
            (C, H, W); noise_std <= 0.
    """

    def __init__(
        self, shape, kernel="gaussian", noise_std: float = 0.05, size: int = 9, std=1.5, angle: float = 45.0, seed: int = 0,
        boundary: str = "reflect",
    ):  # fmt: skip
        shape = image_shape(shape)
        if isinstance(kernel, str):
            match check_choice("kernel", kernel, KERNELS):
                case "gaussian":
                    kernel = gaussian_kernel(size, std)
                case "anisotropic":
                    kernel = anisotropic_kernel(size, std, angle)
                case _:
                    kernel = motion_kernel(size, seed)
        kernel = read_kernel(kernel)
        if kernel.shape[0] > shape[1] or kernel.shape[1] > shape[2]:
            raise ValueError(f"kernel must be no larger than the image, {tuple(shape[1:])}, got {tuple(kernel.shape)}")
        check_choice("boundary", boundary, BOUNDARIES)
        super().__init__(convolution(kernel, boundary, shape), shape, noise_std, boundary=boundary)

    @classmethod
    def from_config(cls, config, weights):
        """Rebuild from `config` and the saved kernel."""
        return cls(kernel=weights["operator.kernel"], **config)
