"""Scores against a known truth.

PSNR and SSIM judge one estimate. Of the posterior mean, they see a shift; they are blind to how widely the draws spread, and where the
posterior has several modes they may rise for draws that keep to one, whose mean is sharper. CRPS judges the draws.
"""

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from rtb_inverse.checks import check_positive
from rtb_inverse.diagnostics.common import check_alike, check_pair


def psnr(estimate: Tensor, truth: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB of (B, *shape) against the truth: (B,)."""
    check_alike("estimate", estimate, "truth", truth)
    check_positive("data_range", data_range)
    error = (estimate - truth).square().reshape(len(truth), -1).mean(1)
    return 10 * torch.log10(data_range**2 / error)


def ssim(estimate: Tensor, truth: Tensor, data_range: float = 2.0) -> Tensor:
    """Mean structural similarity of images (B, C, H, W), (B,), in [-1, 1], 1 for equal images. Wang, Bovik, Sheikh and Simoncelli (2004),
    IEEE Trans. Image Process. 13, 600: K_1 = 0.01, K_2 = 0.03, Gaussian window of 11 x 11 pixels and standard deviation 1.5, each channel
    alone, averaged over the places where the window lies inside the image. For images below 11 pixels the window is the largest odd one
    that fits, with its standard deviation in proportion.

    Args:
        data_range: largest minus smallest possible value.

    Raises:
        ValueError: for an image below 3 pixels.
    """
    check_alike("estimate", estimate, "truth", truth)
    check_positive("data_range", data_range)
    if truth.ndim != 4 or min(truth.shape[2:]) < 3:
        raise ValueError(f"truth must have shape (B, C, H, W) with H and W at least 3, got {tuple(truth.shape)}")
    C, side = truth.shape[1], min(truth.shape[2:])
    radius = min(5, (side - 1) // 2)
    offset = torch.arange(-radius, radius + 1, device=truth.device, dtype=torch.float64) / (0.3 * radius)
    window = torch.exp(-(offset**2) / 2)
    window = window[:, None] * window / window.sum() ** 2
    x, y = estimate.double(), truth.double()

    def local(v: Tensor) -> Tensor:
        return conv2d(v, window.expand(C, 1, -1, -1), groups=C)

    mean_x, mean_y = local(x), local(y)
    var_x, var_y, cov = local(x * x) - mean_x**2, local(y * y) - mean_y**2, local(x * y) - mean_x * mean_y
    c_1, c_2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    similarity = (2 * mean_x * mean_y + c_1) * (2 * cov + c_2) / ((mean_x**2 + mean_y**2 + c_1) * (var_x + var_y + c_2))
    return similarity.flatten(1).mean(1).to(truth.dtype)


def crps(draws: Tensor, truth: Tensor) -> Tensor:
    """Continuous ranked probability score E|x - x*| - E|x - x'| / 2, averaged over elements: (B,), in the units of x, lower is better and
    lowest in the mean for draws of the posterior. Gneiting and Raftery (2007), JASA 102, 359; unbiased in N ("fair": Ferro 2014,
    Q. J. R. Meteorol. Soc. 140, 1917). It sees elements only, not what they do jointly.

    Args:
        draws: (N, B, *shape), at least 2.
        truth: (B, *shape).
    """
    check_pair(draws, truth, 2)
    N, B = draws.shape[:2]
    error = (draws - truth).reshape(N, B, -1)
    weight = 2 * torch.arange(1, N + 1, device=error.device, dtype=error.dtype) - N - 1
    pairs = torch.einsum("n,nbd->bd", weight, error.sort(0).values)  # sum over i < j of |x_i - x_j|
    return (error.abs().mean(0) - pairs / (N * (N - 1))).mean(1)
