"""The videos and images of one prompt, from files to patches: what decoding processes do."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nemo_care.data.images import ImageFile
from nemo_care.data.media_errors import one_line
from nemo_care.data.patches import Grid, Patching, PixelBounds
from nemo_care.data.video import FrameChoice, VideoFile
from nemo_care.errors import InputError
from nemo_care.process.quiet import silent_stderr
from nemo_care.recipe.data import DataConfig


@dataclass(frozen=True)
class MediaSettings:
    """How all media of a run are read."""

    frames: FrameChoice
    video_pixels: PixelBounds
    image_pixels: PixelBounds
    patching: Patching

    @classmethod
    def of(cls, config: DataConfig, patching: Patching) -> "MediaSettings":
        """As the recipe and the model's family say."""
        video, image = config.video, config.image
        return cls(
            FrameChoice(video.fps, video.min_frames, video.max_frames),
            PixelBounds(video.min_pixels, video.max_pixels),
            PixelBounds(image.min_pixels, image.max_pixels),
            patching,
        )


@dataclass(frozen=True)
class MediaRequest:
    """The files of one prompt, and for how many vision tokens the prompt has room."""

    settings: MediaSettings
    videos: tuple[Path, ...]
    images: tuple[Path, ...]
    room: int


@dataclass
class Media:
    """What the files of one prompt hold, videos first.

    `grids`, `seconds_per_grid` (0.0 for an image) and `frame_times` (the seconds at which a video's
    frames are shown, none for an image) have an entry per file. `pixel_values`
    float32 [patches, values of a patch] is an array, because an array travels
    between processes without shared memory; None where there is nothing or no room for it.
    `videos_by_pyav` counts the videos that PyAV decoded because decord could not.
    """

    grids: list[Grid] = field(default_factory=list)
    seconds_per_grid: list[float] = field(default_factory=list)
    pixel_values: np.ndarray | None = None
    videos_by_pyav: int = 0
    frame_times: list[tuple[float, ...]] = field(default_factory=list)


def load_media(request: MediaRequest) -> Media:
    """Reads the files; where they have more vision tokens than there is room for, sizes only.

    Raises:
        UnreadableMedia: a file can't be decoded.
        InputError: a frame too narrow to resize.
    """
    settings = request.settings
    videos = [VideoFile(path, settings.frames) for path in request.videos]
    images = [ImageFile(path) for path in request.images]
    grids = [
        *(_grid(video, video.count, settings.video_pixels, settings.patching) for video in videos),
        *(_grid(image, 1, settings.image_pixels, settings.patching) for image in images),
    ]
    media = Media(grids, [*(video.seconds_per_grid for video in videos), *(0.0 for _ in images)])
    media.frame_times = [*(video.times for video in videos), *(() for _ in images)]
    media.videos_by_pyav = sum(video.by_pyav for video in videos)
    if not grids or sum(map(settings.patching.tokens, grids)) > request.room:
        return media

    def patches(frames: Iterable[Tensor], bounds: PixelBounds) -> Tensor:
        return settings.patching.patches(frames, bounds)[0]

    parts = [
        *(patches(video.frames(), settings.video_pixels) for video in videos),
        *(patches([image.frame()], settings.image_pixels) for image in images),
    ]
    media.pixel_values = torch.cat(parts).numpy()
    media.videos_by_pyav = sum(video.by_pyav for video in videos)  # some turned to it on the way
    return media


def _grid(file: VideoFile | ImageFile, count: int, bounds: PixelBounds, patching: Patching) -> Grid:
    """The grid of `count` frames of a file.

    Raises:
        InputError: names the file, whose frames are too narrow to resize.
    """
    try:
        return patching.grid(count, file.height, file.width, bounds)
    except InputError as error:
        raise InputError(f"{one_line(str(file.path))}: {error}") from error


def measure_media(request: MediaRequest) -> Media:
    """As `load_media`, for who asks whether files can be read, and not what is in them.

    Pixel values are large and would have to travel between processes: they are left behind. So is
    what ffmpeg writes to stderr about files that are broken.

    Raises:
        UnreadableMedia: a file can't be decoded.
        InputError: a frame too narrow to resize.
    """
    with silent_stderr():
        media = load_media(request)
    media.pixel_values = None
    return media
