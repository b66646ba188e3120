"""Frames resized, and cut into patches for the vision tower in Qwen's order, without torchvision.

torchvision is avoided because its wheel does not load beside a CPU build of torch; Hugging Face's
own video processor needs it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

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

    @classmethod
    def of(cls, vision: Any) -> Self:
        """Return what transformers' configuration of a vision tower says."""
        return cls(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)

    @property
    def values(self) -> int:
        """Numbers of one patch; frames have three colours."""
        return 3 * self.frames * self.side**2

    def tokens(self, grid: Grid) -> int:
        """Vision tokens of a grid of patches."""
        t, h, w = grid
        return t * h * w // self.merge**2

    def size(self, height: int, width: int, bounds: PixelBounds) -> tuple[int, int]:
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
        """The grid that `count` frames of this size will have; raises InputError as `size`."""
        new_height, new_width = self.size(height, width, bounds)
        return -(-count // self.frames), new_height // self.side, new_width // self.side

    def frame_shape(self, grid: Grid) -> tuple[int, int, int, int]:
        """As `Patching.frame_shape`."""
        t, h, w = grid
        return t * self.frames, h * self.side, w * self.side, 3

    def resize(self, frame: Tensor, bounds: PixelBounds) -> Tensor:
        """As `Patching.resize`: bicubic with antialiasing; raises InputError as `size`."""
        height, width = frame.shape[:2]
        size = self.size(height, width, bounds)
        if size == (height, width):
            return frame
        image = frame.permute(2, 0, 1)[None]
        # On uint8, torch rounds between the two passes as PIL and torchvision do.
        resized = torch.nn.functional.interpolate(image, size, mode="bicubic", antialias=True)
        return resized[0].permute(1, 2, 0)

    def patches(self, frames: Tensor) -> Tensor:
        """Normalises and cuts the resized frames of one video or image into patches.

        Patches that are merged into one vision token are next to each other. A number of frames
        that does not fill the last temporal patch (an image) is filled with the last frame.

        Args:
            frames: uint8 [count, H, W, 3].

        Returns:
            float32 [t * h * w, 3 * frames * side * side], on the device of the frames.
        """
        device = frames.device
        images = frames.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        # Divided by tensors of the device: CUDA multiplies by the reciprocal of a plain number,
        # which rounds differently. In place, because a long video's patches are large.
        images.div_(torch.full((), 255.0, device=device))
        images.sub_(self.mean.to(device)).div_(self.std.to(device))
        missing = -len(images) % self.frames
        if missing:
            images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
        count, _, height, width = images.shape
        t, h, w = count // self.frames, height // self.side, width // self.side
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
        return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
