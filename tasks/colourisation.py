"""Colourisation: an image of three colours is seen in grey."""

from functools import partial

from tasks.linear import LinearTask, Physics, image_shape

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in ITU-R BT.601


class Colourisation(LinearTask):
    """y = 0.299 red + 0.587 green + 0.114 blue + noise_std n, (B, 1, H, W): the luma of ITU-R BT.601, in the range of x.

    Args:
        shape: of x, (3, H, W).
        noise_std: standard deviation of the noise, > 0, in the units of x (whose range is the prior's own, usually [-1, 1]).

    Raises:
        ValueError: a prior that is not of colour images, shape other than (3, H, W); noise_std <= 0.
    """

    def __init__(self, shape, noise_std: float = 0.05):
        from deepinv.physics import Decolorize

        shape = image_shape(shape, channels=(3,))
        super().__init__(Physics(partial(Decolorize, srf=LUMA), shape), shape, noise_std)

    def condition(self, y):
        """The grey image itself, (B, 1, H, W)."""
        return y
