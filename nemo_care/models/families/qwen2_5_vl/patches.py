"""Frames as patches for the vision tower, in Qwen's order, without torchvision.

torchvision is avoided because its wheel does not load beside a CPU build of torch; Hugging Face's
own video processor needs it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from nemo_care.data.patches import Grid, PixelBounds
from nemo_care.errors import InputError

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class PatchSize:
    """How the model's vision config cuts frames: the family's `Patching`.

    Pixels per patch side, patches per side of what becomes one vision token, frames per patch.
    Colours from 0 to 1 are normalised with `mean` and `std`.
    """

    mean: ClassVar[Tensor] = CLIP_MEAN
    std: ClassVar[Tensor] = CLIP_STD

    side: int = 14
    merge: int = 2
    frames: int = 2

    @property
    def values(self) -> int:
        """Numbers of one patch; frames have three colours."""
        return 3 * self.frames * self.side**2

    def tokens(self, grid: Grid) -> int:
        """Vision tokens of a grid of patches."""
        t, h, w = grid
        return t * h * w // self.merge**2

    def resized(self, height: int, width: int, bounds: PixelBounds) -> tuple[int, int]:
        """Height and width that frames of this size are brought to.

        Raises:
            InputError: one side is more than 200 times the other.
        """
        try:
            return smart_resize(
                height,
                width,
                factor=self.side * self.merge,
                min_pixels=bounds.least,
                max_pixels=bounds.most,
            )
        except ValueError as error:
            raise InputError(
                f"frames of {width}x{height} pixels: too narrow to resize ({error}); crop them"
            ) from error

    def grid(self, count: int, height: int, width: int, bounds: PixelBounds) -> Grid:
        """The grid that `count` frames of this size will have; raises InputError as `resized`."""
        new_height, new_width = self.resized(height, width, bounds)
        return -(-count // self.frames), new_height // self.side, new_width // self.side

    def patches(self, frames: Iterable[Tensor], bounds: PixelBounds) -> tuple[Tensor, Grid]:
        """Resizes, normalises and cuts frames into patches.

        Patches that are merged into one vision token lie next to each other. A number of frames
        that does not fill the last temporal patch (an image) is filled with the last frame.

        Args:
            frames: uint8 [H, W, 3] each, all of one size; resized one by one, so that an iterator
                that decodes them never has two frames of full size in memory.
            bounds: of a frame's area.

        Returns:
            pixel_values: float32 [t * h * w, 3 * frames * side * side].
            grid: (t, h, w).

        Raises:
            InputError: one side of the frames is more than 200 times the other.
        """
        images = torch.stack([self._resize(frame, bounds) for frame in frames])
        images = (images.float() / 255 - self.mean) / self.std
        missing = -len(images) % self.frames
        if missing:
            images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
        t, h, w = (
            size // cut
            for size, cut in zip(
                (len(images), *images.shape[2:]), (self.frames, self.side, self.side), strict=True
            )
        )
        cut = images.reshape(
            t,
            self.frames,
            3,
            h // self.merge,
            self.merge,
            self.side,
            w // self.merge,
            self.merge,
            self.side,
        )
        # -> t, merged row, merged column, row and column inside it | channel, time, pixel row,
        # column
        patches = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return patches.reshape(t * h * w, -1), (t, h, w)

    def _resize(self, frame: Tensor, bounds: PixelBounds) -> Tensor:
        """A frame uint8 [H, W, 3] as uint8 [3, new H, new W]."""
        height, width = frame.shape[:2]
        size = self.resized(height, width, bounds)
        image = frame.permute(2, 0, 1)
        if size == (height, width):
            return image
        # On uint8, torch rounds between the two passes as PIL and torchvision do.
        return torch.nn.functional.interpolate(image[None], size, mode="bicubic", antialias=True)[0]

    def frames_of(self, patches: Tensor, grid: Grid) -> Tensor:
        """The inverse of `patches`, exact to the last bit of each pixel.

        Args:
            patches: float32 [t * h * w, 3 * frames * side * side] of one video or image.
            grid: (t, h, w).

        Returns:
            uint8 [t * frames, H, W, 3]. An image comes back `frames` times, as it was filled up.
        """
        t, h, w = grid
        cut = patches.reshape(
            t,
            h // self.merge,
            w // self.merge,
            self.merge,
            self.merge,
            3,
            self.frames,
            self.side,
            self.side,
        )
        # -> t, time | channel | merged row, row inside it, pixel row | the same of columns
        images = cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(
            t * self.frames, 3, h * self.side, w * self.side
        )
        # Normalising moves a pixel by a few parts in 1e7, far less than the half that rounding
        # takes.
        pixels = ((images * self.std + self.mean) * 255).round().clamp(0, 255)
        return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
