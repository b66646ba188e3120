"""Frames as patches for the vision tower, in Qwen's order, without torchvision.

torchvision is avoided because its wheel does not load beside a CPU build of torch; Hugging Face's
own video processor needs it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from nemo_care.errors import InputError

Grid = tuple[int, int, int]
"""Patches along time, height and width."""

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


@dataclass(frozen=True)
class PatchSize:
    """How the model's vision config cuts frames: pixels per patch side, patches per side of what
    becomes one vision token, frames per patch."""

    side: int = 14
    merge: int = 2
    frames: int = 2

    def tokens(self, grid: Grid) -> int:
        """Vision tokens of a grid of patches."""
        t, h, w = grid
        return t * h * w // self.merge**2


@dataclass(frozen=True)
class PixelBounds:
    """Smallest and largest number of pixels of a frame after resizing."""

    least: int
    most: int


def resized(height: int, width: int, bounds: PixelBounds, patch: PatchSize) -> tuple[int, int]:
    """Height and width that frames of this size are brought to.

    Raises:
        InputError: one side is more than 200 times the other.
    """
    try:
        return smart_resize(
            height,
            width,
            factor=patch.side * patch.merge,
            min_pixels=bounds.least,
            max_pixels=bounds.most,
        )
    except ValueError as error:
        raise InputError(
            f"frames of {width}x{height} pixels: too narrow to resize ({error}); crop them"
        ) from error


def grid_of(
    count: int, height: int, width: int, bounds: PixelBounds, patch: PatchSize = PatchSize()
) -> Grid:
    """The grid that `count` frames of this size will have; raises InputError as `resized`."""
    new_height, new_width = resized(height, width, bounds, patch)
    return -(-count // patch.frames), new_height // patch.side, new_width // patch.side


def frames_to_patches(
    frames: Iterable[Tensor], bounds: PixelBounds, patch: PatchSize = PatchSize()
) -> tuple[Tensor, Grid]:
    """Resizes, normalises and cuts frames into patches.

    Patches that are merged into one vision token lie next to each other. A number of frames that
    does not fill the last temporal patch (an image) is filled with the last frame.

    Args:
        frames: uint8 [H, W, 3] each, all of one size; resized one by one, so that an iterator that
            decodes them never has two frames of full size in memory.
        bounds: of a frame's area.
        patch: as in the model's vision config.

    Returns:
        pixel_values: float32 [t * h * w, 3 * frames * side * side].
        grid: (t, h, w).

    Raises:
        InputError: one side of the frames is more than 200 times the other.
    """
    images = torch.stack([_resize(frame, bounds, patch) for frame in frames])
    images = (images.float() / 255 - CLIP_MEAN) / CLIP_STD
    missing = -len(images) % patch.frames
    if missing:
        images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
    t, h, w = (
        size // cut
        for size, cut in zip(
            (len(images), *images.shape[2:]), (patch.frames, patch.side, patch.side), strict=True
        )
    )
    cut = images.reshape(
        t,
        patch.frames,
        3,
        h // patch.merge,
        patch.merge,
        patch.side,
        w // patch.merge,
        patch.merge,
        patch.side,
    )
    # -> t, merged row, merged column, row and column inside it | channel, time, pixel row, column
    patches = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.reshape(t * h * w, -1), (t, h, w)


def _resize(frame: Tensor, bounds: PixelBounds, patch: PatchSize) -> Tensor:
    """A frame uint8 [H, W, 3] as uint8 [3, new H, new W]."""
    height, width = frame.shape[:2]
    size = resized(height, width, bounds, patch)
    image = frame.permute(2, 0, 1)
    if size == (height, width):
        return image
    # On uint8, torch rounds between the two passes as PIL and torchvision do.
    return torch.nn.functional.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
