"""How frames become patches, in two parts: what a model family does for the data pipeline.

Frames are resized where they are decoded and stay uint8. The first pipeline stage cuts them into
patches, which are four times as large, one micro-batch at a time. A family implements `Patching`,
which the pipeline gets from its callers.
"""

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
    """Resizes frames in the decoding processes; normalises and cuts them on the first stage."""

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

    def frame_shape(self, grid: Grid) -> tuple[int, int, int, int]:
        """Shape [count, H, W, 3] of the resized frames that fill a grid."""

    def resize(self, frame: Tensor, bounds: PixelBounds) -> Tensor:
        """A frame uint8 [H, W, 3] in the size that its patches fill; raises InputError as `grid`.

        Runs on the CPU, in a decoding process.
        """

    def patches(self, frames: Tensor) -> Tensor:
        """Patches float32 [t * h * w, values] of the resized frames of one video or image.

        `frames` uint8 [count, H, W, 3]; count is 1 for an image. The patches are on their device,
        with the same values on all.
        """
