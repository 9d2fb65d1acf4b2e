"""Super-resolution: a small image, every pixel of which is a weighted mean of the large one."""

import torch
from torch import Tensor, nn

from rtb_inverse.checks import check_choice, check_count
from tasks.linear import LinearTask, image_shape


def shrinking(n: int, factor: int, method: str) -> Tensor:
    """The matrix (n / factor, n) that makes a line of n pixels shorter: each row a window of weights that sum to 1, those of the
    border renormalised."""
    options = {"antialias": True} if method == "bicubic" else {}
    lines = torch.eye(n, dtype=torch.float64)[:, None, None].expand(n, 1, factor, n)  # constant along the other axis
    return nn.functional.interpolate(lines, (1, n // factor), mode=method, **options)[:, 0, 0].T.float().contiguous()


class Shrink(nn.Module):
    """R x C^T, with one matrix for the rows and one for the columns: (M, C, H, W) to (M, C, H / factor, W / factor)."""

    rows: Tensor
    columns: Tensor

    def __init__(self, rows: Tensor, columns: Tensor):
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows.to(x.dtype) @ x @ self.columns.to(x.dtype).T


class SuperResolution(LinearTask):
    """y = x made smaller + noise_std n, (B, C, H / factor, W / factor).

    Args:
        shape: of x, (C, H, W).
        factor: by which both sides shrink; divides both.
        method: "bicubic", Keys' kernel (a = -1/2) stretched by the factor, which keeps out frequencies that the small image cannot
            hold (what Pillow and Matlab do); "area", the mean of each block of factor x factor pixels.
        noise_std: standard deviation of the noise, > 0, in the units of x (whose range is the prior's own, usually [-1, 1]).

    Raises:
        ValueError: a factor that does not divide H and W, or is below 2; another method; a shape that is not (C, H, W); noise_std <= 0.
    """

    def __init__(self, shape, factor: int = 4, method: str = "bicubic", noise_std: float = 0.05):
        shape = image_shape(shape)
        check_choice("method", method, ("bicubic", "area"))
        if any(n % check_count("factor", factor, 2) for n in shape[1:]):
            raise ValueError(f"factor must divide the sides of x, {shape[1]} and {shape[2]}, got {factor}")
        rows, columns = (shrinking(n, factor, method) for n in shape[1:])
        super().__init__(Shrink(rows, columns), shape, noise_std, factor=factor, method=method)
