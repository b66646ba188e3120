"""How frames become patches: what the data pipeline asks of a model family.

A family implements `Patching`; the pipeline gets it from outside and knows no family.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

Grid = tuple[int, int, int]
"""Patches along time, height and width."""


@dataclass(frozen=True)
class PixelBounds:
    """Smallest and largest number of pixels of a frame after resizing."""

    least: int
    most: int


class Patching(Protocol):
    """Resizes, normalises and cuts frames; travels to the decoding processes."""

    @property
    def frames(self) -> int:
        """Frames that share a temporal patch."""

    @property
    def values(self) -> int:
        """Numbers of one patch."""

    def tokens(self, grid: Grid) -> int:
        """Vision tokens of a grid of patches."""

    def grid(self, count: int, height: int, width: int, bounds: PixelBounds) -> Grid:
        """The grid that `count` frames of this size will have.

        Raises:
            InputError: the frames can't be resized.
        """

    def patches(self, frames: Iterable[Tensor], bounds: PixelBounds) -> tuple[Tensor, Grid]:
        """Patches float32 [t * h * w, values] of frames uint8 [H, W, 3], and their grid.

        The frames have one size and are resized one by one, so that an iterator that decodes them
        never has two frames of full size in memory. Raises InputError as `grid`.
        """

    def frames_of(self, patches: Tensor, grid: Grid) -> Tensor:
        """The resized frames, uint8 [t * frames, H, W, 3], that `patches` has cut.

        An image comes back `frames` times, as it was filled up.
        """
