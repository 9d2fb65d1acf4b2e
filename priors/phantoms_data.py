r"""Phantoms for tomography, (1, size, size) in [-1, 1]: bodies of ellipses within ellipses, each of one attenuation; -1 is air, 1 is bone.

An ellipse is the image of the unit disc under an affine frame F (3 x 3, homogeneous): a point p of the plane is in it where

    |(F^{-1} p)_{1,2}| < 1,      F = F_parent F_relative,

and what is within another is placed in the frame of the other: at distance d < 1 - a from its middle, of semi-axes a >= b, so that it never
sticks out. A body, perhaps with a rim of bone or of fat, holds a pair of mirrored organs, single organs, organs within these, and dense
inserts and bubbles of air. They are painted one over the other.
"""

import math

import torch
from torch import Generator, Tensor

from priors.simulated import Draws, SimulatedData, in_parts
from rtb_inverse.checks import check_count

FINE = 3  # samples per pixel and axis
ORGANS, NESTED, INSERTS = 6, 4, 5  # at most so many of each


class Ellipses(Draws):
    """Random ellipses, too."""

    def first(self, least: int, most: int) -> Tensor:
        """True for the first k of `most`, k uniform from `least` on: (n, most)."""
        return torch.arange(most) < torch.floor(self.uniform(least, most + 1, 1))

    def frames(self, low: float, high: float, flat: float, *shape: int) -> Tensor:
        """Ellipses anywhere within the unit disc, (n, *shape, 3, 3): major semi-axes log-uniform, axis ratios uniform from `flat` to 1."""
        a = self.log_uniform(low, high, *shape)
        d, where = 0.97 * (1 - a) * self.uniform(0, 1, *shape).sqrt(), self.uniform(0, 2 * math.pi, *shape)
        return frame(d * where.cos(), d * where.sin(), a, a * self.uniform(flat, 1, *shape), self.uniform(0, math.pi, *shape))


def frame(x: Tensor, y: Tensor, a: Tensor, b: Tensor, angle: Tensor) -> Tensor:
    """F of ellipses about (x, y), of semi-axes a, b, the first at `angle`: (..., 3, 3)."""
    c, s, zero = angle.cos(), angle.sin(), torch.zeros_like(x)
    rows = [torch.stack(row, -1) for row in ((a * c, -b * s, x), (a * s, b * c, y), (zero, zero, zero + 1))]
    return torch.stack(rows, -2)


def tissue(draws: Ellipses, base: Tensor, *shape: int) -> Tensor:
    """Attenuation of organs in a tissue `base` (n, *ones): lighter or denser by 0.12 to 0.5, within [-0.8, 0.7]."""
    sign = torch.where(draws.chance(0.5, *shape), 1.0, -1.0)
    return (base + sign * draws.uniform(0.12, 0.5, *shape)).clamp(-0.8, 0.7)


def bodies(draws: Ellipses) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (n, K, 3, 3), attenuations (n, K) and whether they are there at all (n, K), in the order in which they are painted."""
    one = torch.ones((draws.n, 1), dtype=torch.bool)
    long = draws.uniform(0.74, 0.95, 1)
    shift = (0.97 - long) * draws.uniform(-1, 1, 2)
    body = frame(shift[:, :1], shift[:, 1:], long, long * draws.uniform(0.66, 1, 1), draws.uniform(0, math.pi, 1))
    base, kind = draws.uniform(-0.3, 0.15, 1), draws.uniform(0, 1, 1)
    bone, fat = kind < 0.35, kind > 0.65
    rim = torch.where(bone, draws.uniform(0.6, 1, 1), base - draws.uniform(0.15, 0.35, 1))
    thick = torch.where(bone, draws.uniform(0.05, 0.14, 1), draws.uniform(0.06, 0.2, 1))
    inner = body @ torch.diag_embed(torch.stack([1 - thick, 1 - thick, torch.ones_like(thick)], -1))

    left = frame(
        draws.uniform(0.3, 0.46, 1), draws.uniform(-0.2, 0.2, 1), draws.uniform(0.2, 0.5, 1), draws.uniform(0.12, 0.3, 1),
        draws.uniform(0.33, 0.67, 1) * math.pi,
    )  # fmt: skip
    pair = torch.cat([left, torch.diag(torch.tensor([-1.0, 1.0, 1.0])) @ left], 1)
    paired = draws.chance(0.45, 1)
    of_pair = torch.where(draws.chance(0.4, 1), draws.uniform(-0.95, -0.7, 1), tissue(draws, base, 1))  # lungs, or other organs

    organs, of_organs = draws.frames(0.12, 0.5, 0.4, ORGANS), tissue(draws, base, ORGANS)
    nested = organs[:, :NESTED] @ draws.frames(0.3, 0.75, 0.5, NESTED)
    of_nested = tissue(draws, of_organs[:, :NESTED], NESTED)
    here = draws.first(2, ORGANS)

    inserts = draws.frames(0.04, 0.11, 0.6, INSERTS)
    of_inserts = torch.where(draws.chance(0.75, INSERTS), draws.uniform(0.65, 1, INSERTS), draws.uniform(-1, -0.8, INSERTS))
    frames = torch.cat([body, inner, inner @ torch.cat([pair, organs], 1), inner @ nested, inner @ inserts], 1)
    values = torch.cat([torch.where(bone | fat, rim, base), base, of_pair, of_pair, of_organs, of_nested, of_inserts], 1)
    shown = [one, one, paired, paired, here, here[:, :NESTED] & draws.chance(0.5, NESTED), draws.first(0, INSERTS)]
    return frames, values, torch.cat(shown, 1)


def paint(frames: Tensor, values: Tensor, shown: Tensor, size: int) -> Tensor:
    """Pictures of ellipses (see `bodies`), (n, size, size): those shown, one over the other on air; each pixel the mean of its samples."""
    axis = (2 * torch.arange(FINE * size) + 1) / (FINE * size) - 1
    p = torch.stack([axis.expand(len(axis), -1), axis[:, None].expand(-1, len(axis)), torch.ones(len(axis), len(axis))]).flatten(1)
    to_disc = torch.linalg.inv(frames)[..., :2, :]
    picture = torch.full((len(frames), p.shape[1]), -1.0)
    for k in range(frames.shape[1]):
        inside = ((to_disc[:, k] @ p).square().sum(1) < 1) & shown[:, k, None]
        picture = torch.where(inside, values[:, k, None], picture)
    return torch.nn.functional.avg_pool2d(picture.reshape(-1, 1, len(axis), len(axis)), FINE)[:, 0]


def phantoms(n: int, generator: Generator | None = None, size: int = 32) -> Tensor:
    """n phantoms, (n, 1, size, size) float32 in [-1, 1], on a field of view of width 2, with -1 outside of the body.

    A body of major semi-axis 0.74 to 0.95 and axis ratio 0.66 to 1, turned anyhow, of an attenuation of -0.3 to 0.15; 35 % have a rim of
    bone (0.6 to 1), 35 % one of fat (0.15 to 0.35 below the body). In its frame: with probability 0.45 a pair of mirrored organs, 40 % of
    them lungs (-0.95 to -0.7); 2 to 6 organs of 12 to 50 % of its size, lighter or denser by 0.12 to 0.5, half of the first four with
    another one inside; up to 5 inserts of 4 to 11 % of its size, three in four dense (0.65 to 1), the others air. Edges are averaged over
    3 x 3 samples per pixel.

    Raises:
        ValueError: n or size below 1.
    """
    check_count("n", n), check_count("size", size)
    return in_parts(n, lambda count: paint(*bodies(Ellipses(count, generator)), size))[:, None]


class PhantomData(SimulatedData):
    """`phantoms`, for training a prior."""

    make = staticmethod(phantoms)
