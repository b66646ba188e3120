"""The videos and images of one prompt, from files to resized frames: what decoding processes do."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nemo_care.data.frame_cache import CacheSettings, DecodedFile, FrameCache, open_cache
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
    cache: CacheSettings | None = None

    @classmethod
    def of(cls, config: DataConfig, patching: Patching) -> "MediaSettings":
        """As the recipe and the model's family say."""
        video, image = config.video, config.image
        return cls(
            FrameChoice(video.fps, video.min_frames, video.max_frames),
            PixelBounds(video.min_pixels, video.max_pixels),
            PixelBounds(image.min_pixels, image.max_pixels),
            patching,
            CacheSettings.of(config),
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

    `grids`, `seconds_per_grid` (0.0 for an image) and `prompt_times` (the seconds of a video's
    frames since its first, none for an image) have an entry per file. So do `frames`, uint8
    [count, H, W, 3] in the size that their patches fill: arrays, because these travel between
    processes without shared memory. They are missing where there is no room for them.
    `videos_by_pyav` counts the videos that PyAV decoded because decord could not. `frame_times`
    has the seconds at which the frames of each video appear.
    """

    grids: list[Grid] = field(default_factory=list)
    seconds_per_grid: list[float] = field(default_factory=list)
    frames: list[np.ndarray] = field(default_factory=list)
    videos_by_pyav: int = 0
    frame_times: list[tuple[float, ...]] = field(default_factory=list)
    prompt_times: list[tuple[float, ...]] = field(default_factory=list)


def load_media(request: MediaRequest) -> Media:
    """Reads the files; where they have more vision tokens than there is room for, sizes only.

    Raises:
        UnreadableMedia: a file can't be decoded.
        InputError: a frame too narrow to resize.
    """
    settings = request.settings
    files = [
        *(_MediaFile(path, settings, is_video=True) for path in request.videos),
        *(_MediaFile(path, settings, is_video=False) for path in request.images),
    ]
    media = Media([file.grid for file in files], [file.source.seconds_per_grid for file in files])
    if sum(map(settings.patching.tokens, media.grids)) <= request.room:
        media.frames = [file.frames() for file in files]
    # Read last: some videos are handed over to PyAV on the way.
    media.videos_by_pyav = sum(file.source.by_pyav for file in files)
    media.frame_times = [file.source.frame_times for file in files if file.is_video]
    media.prompt_times = [file.source.prompt_times for file in files]
    return media


class _MediaFile:
    """One file, found in the cache or opened: its grid is known, and its frames can be read."""

    def __init__(self, path: Path, settings: MediaSettings, *, is_video: bool) -> None:
        """Raises as `load_media`."""
        self.is_video = is_video
        self._patching = settings.patching
        self._bounds = settings.video_pixels if is_video else settings.image_pixels
        self._cache, self._name, entry = None, None, None
        if settings.cache is not None:
            self._cache = open_cache(settings.cache)
            choice = settings.frames if is_video else None
            self._name = FrameCache.name(path, choice, self._bounds, settings.patching)
            entry = self._cache.get(self._name) if self._name else None
        self.source: DecodedFile | VideoFile | ImageFile
        if entry is not None:
            self.source, self.grid = entry, entry.grid
        else:
            self.source = VideoFile(path, settings.frames) if is_video else ImageFile(path)
            self.grid = _grid(self.source, self._bounds, settings.patching)

    def frames(self) -> np.ndarray:
        """The resized frames, uint8 [count, H, W, 3]; raises UnreadableMedia."""
        source = self.source
        if isinstance(source, DecodedFile):
            return source.frames
        frames = self._resized(source)
        if self._cache is not None and self._name is not None:
            entry = DecodedFile(
                self.grid,
                source.seconds_per_grid,
                frames,
                source.by_pyav,
                source.frame_times,
                source.prompt_times,
            )
            self._cache.put(self._name, entry)
        return frames

    def _resized(self, file: VideoFile | ImageFile) -> np.ndarray:
        """Resizes frame by frame: no two of full size are in memory, nor two copies of the rest."""
        frames = None
        for place, frame in enumerate(file.frames()):
            resized = self._patching.resize(frame, self._bounds).numpy()
            if frames is None:
                frames = np.empty((file.count, *resized.shape), dtype=np.uint8)
            frames[place] = resized
        assert frames is not None, "a file has at least one frame"
        return frames


def _grid(file: VideoFile | ImageFile, bounds: PixelBounds, patching: Patching) -> Grid:
    """The grid of a file's frames.

    Raises:
        InputError: names the file, whose frames are too narrow to resize.
    """
    try:
        return patching.grid(file.count, file.height, file.width, bounds)
    except InputError as error:
        raise InputError(f"{one_line(str(file.path))}: {error}") from error


def measure_media(request: MediaRequest) -> Media:
    """As `load_media`, for checks of whether files can be read.

    Frames, which would have to travel between processes, are left out, and so is what ffmpeg writes
    to stderr about broken files.

    Raises:
        UnreadableMedia: a file can't be decoded.
        InputError: a frame too narrow to resize.
    """
    with silent_stderr():
        media = load_media(request)
    media.frames = []
    return media
