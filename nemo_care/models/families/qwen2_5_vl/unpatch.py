"""Patches back to frames: the inverse of `patches.py`, exact to the last bit of each pixel."""

import torch
from torch import Tensor

from nemo_care.data.patches import CLIP_MEAN, CLIP_STD, Grid, PatchSize


def patches_to_frames(patches: Tensor, grid: Grid, patch: PatchSize) -> Tensor:
    """The resized frames that `frames_to_patches` has cut.

    Args:
        patches: float32 [t * h * w, 3 * frames * side * side] of one video or image.
        grid: (t, h, w).
        patch: as in the model's vision config.

    Returns:
        uint8 [t * frames, H, W, 3]. An image comes back `frames` times, as it was filled up.
    """
    t, h, w = grid
    cut = patches.reshape(
        t,
        h // patch.merge,
        w // patch.merge,
        patch.merge,
        patch.merge,
        3,
        patch.frames,
        patch.side,
        patch.side,
    )
    # -> t, time | channel | merged row, row inside it, pixel row | the same of columns
    images = cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(
        t * patch.frames, 3, h * patch.side, w * patch.side
    )
    # Normalising moves a pixel by a few parts in 1e7, far less than the half that rounding takes.
    pixels = ((images * CLIP_STD + CLIP_MEAN) * 255).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
