"""Videos and images as patches for the vision tower, without torchvision.

torchvision is avoided because its wheel does not load beside a CPU build of torch; Hugging Face's
own video processor needs it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from nemo_care.errors import InputError

# Two frames share a temporal patch, so frame counts are even.
FRAME_FACTOR = 2
_CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
_CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)


class UnreadableMedia(InputError):
    """A video or image that can't be decoded; the message names the file and the cause."""


@dataclass(frozen=True)
class VideoSampling:
    """How many frames of a video the model sees, and how large each may be, in pixels."""

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 16
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 128 * 28 * 28


@dataclass(frozen=True)
class DecodedVideo:
    """Frames uint8 [T, H, W, 3] of a video, and the seconds covered by one temporal patch."""

    frames: Tensor
    seconds_per_grid: float


def choose_frames(total: int, average_fps: float, sampling: VideoSampling) -> list[int]:
    """Indices of the frames to read, evenly spread: Qwen's `smart_nframes` rule.

    About `sampling.fps` frames per second, within min_frames, max_frames and `total`, an even
    count. Needs at least 2 frames in total.
    """
    least = -(-sampling.min_frames // FRAME_FACTOR) * FRAME_FACTOR
    wanted = min(max(total / average_fps * sampling.fps, least), sampling.max_frames, total)
    count = max(int(wanted // FRAME_FACTOR), 1) * FRAME_FACTOR
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def read_video(path: str | Path, sampling: VideoSampling) -> DecodedVideo:
    """Decodes the frames that `sampling` chooses.

    Raises:
        UnreadableMedia: the file is missing, empty, not a video, broken, or has fewer than two
            frames.
    """
    import decord  # loads ffmpeg; only processes that decode need it

    path = Path(path)
    _check_file(path, "video")
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        total, average_fps = len(reader), float(reader.get_avg_fps())
    except (RuntimeError, AssertionError, decord.DECORDError) as error:
        raise _unreadable(path, "video", "it can't be opened as a video") from error
    if total < FRAME_FACTOR:
        raise _unreadable(path, "video", f"it has {total} frame(s), at least 2 are needed")
    if not 0 < average_fps < float("inf"):
        raise _unreadable(path, "video", f"its frame rate is {average_fps}")
    indices = choose_frames(total, average_fps, sampling)
    try:
        frames = torch.from_numpy(reader.get_batch(indices).asnumpy())
    except (RuntimeError, decord.DECORDError) as error:
        raise _unreadable(path, "video", "its frames can't be decoded") from error
    sampled_fps = len(indices) / total * average_fps
    return DecodedVideo(frames, FRAME_FACTOR / sampled_fps)


def read_image(path: str | Path) -> Tensor:
    """An image as one RGB frame, uint8 [1, H, W, 3], turned as its EXIF orientation says.

    Raises:
        UnreadableMedia: the file is missing, empty, or not an image that PIL can read.
    """
    path = Path(path)
    _check_file(path, "image")
    try:
        with Image.open(path) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        cause = "it can't be decoded as an image"
        raise _unreadable(path, "image", cause) from error
    return torch.from_numpy(pixels)[None]


def frames_to_patches(
    frames: Tensor,
    sampling: VideoSampling,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
) -> tuple[Tensor, tuple[int, int, int]]:
    """Resizes, normalises and cuts frames into patches, in Qwen's order.

    Patches that are merged into one vision token lie next to each other. A number of frames that
    does not fill the last temporal patch (an image) is filled with the last frame.

    Args:
        frames: uint8 [T, H, W, 3].
        sampling: gives the bounds of a frame's area.
        patch_size, merge_size, temporal_patch_size: as in the model's vision config.

    Returns:
        pixel_values: float32 [t * h * w, 3 * temporal_patch_size * patch_size ** 2].
        grid: (t, h, w), the number of patches along time, height and width.

    Raises:
        InputError: one side of the frames is more than 200 times the other.
    """
    images = frames.permute(0, 3, 1, 2)
    height, width = images.shape[2:]
    try:
        new_height, new_width = smart_resize(
            height,
            width,
            factor=patch_size * merge_size,
            min_pixels=sampling.min_pixels,
            max_pixels=sampling.max_pixels,
        )
    except ValueError as error:
        raise InputError(
            f"frames of {width}x{height} pixels: too narrow to resize ({error}); crop them"
        ) from error
    if (new_height, new_width) != (height, width):
        # On uint8, torch rounds between the two passes as PIL and torchvision do.
        images = torch.nn.functional.interpolate(
            images, (new_height, new_width), mode="bicubic", antialias=True
        )
    images = (images.float() / 255 - _CLIP_MEAN) / _CLIP_STD
    missing = -len(images) % temporal_patch_size
    if missing:
        images = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
    t = len(images) // temporal_patch_size
    h, w = new_height // patch_size, new_width // patch_size
    cut = images.reshape(
        t,
        temporal_patch_size,
        3,
        h // merge_size,
        merge_size,
        patch_size,
        w // merge_size,
        merge_size,
        patch_size,
    )
    # -> t, merged row, merged column, row and column inside it | channel, time, pixel row, column
    patches = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.reshape(t * h * w, -1), (t, h, w)


def _check_file(path: Path, kind: str) -> None:
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise _unreadable(path, kind, str(error.strerror)) from error
    if size is None:
        raise _unreadable(path, kind, "there is no such file")
    if size == 0:
        raise _unreadable(path, kind, "the file is empty")


def _unreadable(path: Path, kind: str, cause: str) -> UnreadableMedia:
    return UnreadableMedia(
        f"{path}: {kind} not readable: {cause}; replace the file or remove its sample"
    )
