r"""Compressed sensing: fewer numbers than x has elements, each of which sees all of x.

"gaussian"   y = G vec(x),          G_ij ~ N(0, 1 / m)
"hadamard"   y = S H P D vec(x),    random signs D, zeros appended up to a power of two (P), the orthonormal Walsh-Hadamard transform H,
                                    m of its coefficients (S)   (Do et al. 2012, "Fast and efficient compressive sensing using
                                    structurally random matrices", arXiv 1106.5037)
"fourier"    y = S F x,             m frequencies of the centred orthonormal two-dimensional Fourier transform of every channel
                                    (Candès, Romberg and Tao 2006, arXiv math/0409186)
"""

import math

import torch
from torch import Generator, Tensor, nn

from rtb_inverse.checks import check_choice
from rtb_inverse.problems import MatrixOperator
from rtb_inverse.randomness import made_on_cpu, seeded
from tasks.linear import LinearTask, check_ratio, image_shape
from tasks.mri import Spectrum


class Hadamard(nn.Module):
    """The coefficients `rows` of the Walsh-Hadamard transform of x with the signs `signs`: (M, *shape) to (M, m)."""

    signs: Tensor
    rows: Tensor

    def __init__(self, signs: Tensor, rows: Tensor):
        from deepinv.physics.singlepixel import hadamard_1d

        super().__init__()
        self.register_buffer("signs", signs)
        self.register_buffer("rows", rows)
        self.transform = hadamard_1d

    def forward(self, x: Tensor) -> Tensor:
        d = len(self.signs)
        flat = nn.functional.pad(x.flatten(1) * self.signs.to(x.dtype), (0, power_of_two(d) - d))
        return self.transform(flat)[:, self.rows]


class Fourier(nn.Module):
    """Some frequencies of the spectrum, real and imaginary part, counted from frequency 0 on: (M, C, H, W) to (M, C, m, 2)."""

    frequencies: Tensor

    def __init__(self, shape: torch.Size, frequencies: Tensor):
        super().__init__()
        self.spectrum = Spectrum(*shape[1:])
        self.register_buffer("frequencies", frequencies)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.ifftshift(self.spectrum(x.flatten(0, 1)[:, None]), (1, 2)).flatten(1, 2)
        return spectrum[:, self.frequencies].unflatten(0, x.shape[:2]).contiguous()


@made_on_cpu
def random_matrix(shape: torch.Size, m: int, generator: Generator) -> Tensor:
    """deepinv's, (m, d). It makes the pseudo-inverse too: a quarter of a second at 32 x 32, 20 at 64 x 64."""
    from deepinv.physics import CompressedSensing

    pixels = torch.eye(shape.numel(), dtype=torch.float32).reshape(-1, *shape)
    return CompressedSensing(m, shape, rng=generator).A(pixels).T.contiguous()


@made_on_cpu
def random_signs(d: int, generator: Generator) -> Tensor:
    return (1 - 2 * torch.randint(2, (d,), generator=generator)).to(torch.int8)


@made_on_cpu
def random_rows(n: int, m: int, generator: Generator) -> Tensor:
    """m of the numbers 0 to n - 1, in order."""
    return torch.randperm(n, generator=generator)[:m].sort().values


def power_of_two(n: int) -> int:
    """The first one that is not below n."""
    return 1 << (n - 1).bit_length()


def half_plane(H: int, W: int) -> Tensor:
    """Positions in the flattened spectrum of the frequencies k that say different things of a real image: of k and -k one; 0 first."""
    rows, columns = torch.arange(H)[:, None], torch.arange(W)
    opposite = (-rows % H) * W + -columns % W
    return (rows * W + columns <= opposite).flatten().nonzero()[:, 0]


@made_on_cpu
def choose(n: int, m: int, generator: Generator) -> Tensor:
    """m of the numbers 0 to n - 1, in order; 0, which carries the mean, always."""
    return torch.cat([torch.zeros(1, dtype=torch.long), 1 + random_rows(n - 1, m - 1, generator)])


class CompressedSensing(LinearTask):
    """y = A x + noise_std n with a random A: (B, m), for "fourier" (B, C, m, 2), real and imaginary parts.

    Args:
        shape: of x, (C, H, W).
        kind: "gaussian", whose matrix is kept (for images of up to 32 x 32), "hadamard" or "fourier".
        ratio: m over the number of elements of x; for "fourier" over that of frequencies that differ (of k and -k one), so that y has
            about `ratio` times as many numbers as x there too. In (0, 1].
        seed: of all that is random; the generator's state elsewhere has no part in it and is left as it is.
        noise_std: standard deviation of each number, > 0. In the units of x, whose range is the prior's own (usually [-1, 1]): the rows of
            "hadamard" and "fourier" have about unit norm, those of "gaussian" sqrt(d / m).

    Raises:
        ValueError: a ratio outside (0, 1]; another kind; a shape that is not (C, H, W); noise_std <= 0.
    """

    def __init__(self, shape, kind: str = "gaussian", ratio: float = 0.5, seed: int = 0, noise_std: float = 0.05):
        shape, generator = image_shape(shape), seeded(seed)
        check_choice("kind", kind, ("gaussian", "hadamard", "fourier")), check_ratio("ratio", ratio)
        d, (H, W) = shape.numel(), shape[1:]
        m = max(1, round(ratio * d))
        match kind:
            case "gaussian":
                operator: nn.Module = MatrixOperator(random_matrix(shape, m, generator))
            case "hadamard":
                operator = Hadamard(random_signs(d, generator), random_rows(power_of_two(d), m, generator))
            case _:
                half = half_plane(H, W)
                operator = Fourier(shape, half[choose(len(half), max(1, round(ratio * len(half))), generator)])
        super().__init__(operator, shape, noise_std, kind=kind, ratio=ratio, seed=seed)

    def picture(self, y):
        """Line by line; of "fourier" the logarithm of the magnitudes where they lie in the spectrum, low frequencies in the middle."""
        if self.config["kind"] != "fourier":
            return super().picture(y)
        H, W = self.shape[1:]
        image = y.new_full((*y.shape[:2], H * W), math.nan)
        image[..., self.operator.frequencies] = (y.square().sum(-1).sqrt() + 0.01).log()
        return torch.fft.fftshift(image.unflatten(-1, (H, W)), (-2, -1))
