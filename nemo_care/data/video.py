"""Video and image files as frames.

A `VideoFile` knows how many frames of which size it will give before it has decoded them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nemo_care.errors import InputError

# Two frames share a temporal patch, so frame counts are even.
FRAME_FACTOR = 2
_EXIF_ORIENTATION = 0x0112
_EXIF_SIDEWAYS = (5, 6, 7, 8)


class UnreadableMedia(InputError):
    """A video or image that can't be decoded; the message names the file and the cause."""


@dataclass(frozen=True)
class FrameChoice:
    """How many frames of a video the model sees."""

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 16


def choose_frames(total: int, average_fps: float, choice: FrameChoice) -> list[int]:
    """Indices of the frames to read, evenly spread: Qwen's `smart_nframes` rule.

    About `choice.fps` frames per second, within min_frames, max_frames and `total`, an even count.
    Needs at least 2 frames in total.
    """
    least = -(-choice.min_frames // FRAME_FACTOR) * FRAME_FACTOR
    wanted = min(max(total / average_fps * choice.fps, least), choice.max_frames, total)
    count = max(int(wanted // FRAME_FACTOR), 1) * FRAME_FACTOR
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


class VideoFile:
    """A video whose first frame has been decoded, and no other yet.

    `count` frames of `height` x `width` pixels, turned as the file's rotation says, will be read;
    `seconds_per_grid` is the time that one temporal patch covers.
    """

    def __init__(self, path: str | Path, choice: FrameChoice) -> None:
        """Open the file.

        Raises:
            UnreadableMedia: it is missing, empty, not a video, broken, has fewer than two frames,
                or frames whose timestamps are not in order.
        """
        import decord  # loads ffmpeg; only processes that decode need it

        self.path = Path(path)
        self._error = decord.DECORDError
        _check_file(self.path, "video")
        try:
            self._reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
            total, average_fps = len(self._reader), float(self._reader.get_avg_fps())
        except (RuntimeError, AssertionError, self._error) as error:
            raise self._unreadable("it can't be opened as a video") from error
        if total < FRAME_FACTOR:
            raise self._unreadable(f"it has {total} frame(s), at least {FRAME_FACTOR} are needed")
        if not 0 < average_fps < float("inf"):
            raise self._unreadable(f"its frame rate is {average_fps}")
        # decord finds a frame by its time. In a file put together from others, whose clocks each
        # begin at 0, it gives wrong frames without a word.
        starts = self._reader.get_frame_timestamp(np.arange(total))[:, 0]
        if not (np.diff(starts) > 0).all():
            raise self._unreadable(
                "several frames have the same timestamp, so which is which can't be known; "
                "encode it again"
            )
        self._indices = choose_frames(total, average_fps, choice)
        self.count = len(self._indices)
        self.seconds_per_grid = FRAME_FACTOR / (self.count / total * average_fps)
        self._first = self._read(self._indices[0])
        self.height, self.width = self._first.shape[:2]

    def frames(self) -> Iterator[Tensor]:
        """The frames, uint8 [H, W, 3] each, decoded one by one.

        Raises:
            UnreadableMedia: one can't be decoded.
        """
        yield self._first
        for index in self._indices[1:]:
            yield self._read(index)

    def _read(self, index: int) -> Tensor:
        try:
            frame = torch.from_numpy(self._reader[index].asnumpy())
        except (RuntimeError, self._error) as error:
            raise self._unreadable("its frames can't be decoded") from error
        if frame.shape[2] != 3:  # decord takes the padding of its rows for a colour
            raise self._unreadable("turned frames narrower than 64 pixels can't be read")
        return frame

    def _unreadable(self, cause: str) -> UnreadableMedia:
        return _unreadable(self.path, "video", cause)


class ImageFile:
    """An image whose size is known and whose pixels have not been decoded yet."""

    def __init__(self, path: str | Path) -> None:
        """Open the file.

        Raises:
            UnreadableMedia: it is missing, empty, or not an image that PIL can read.
        """
        self.path = Path(path)
        _check_file(self.path, "image")
        with self._readable():
            self._image = Image.open(path)
            size = self._image.size
            turned = self._image.getexif().get(_EXIF_ORIENTATION) in _EXIF_SIDEWAYS
        self.width, self.height = reversed(size) if turned else size

    def frame(self) -> Tensor:
        """The image as RGB, uint8 [H, W, 3], turned as its EXIF orientation says.

        Raises:
            UnreadableMedia: it can't be decoded.
        """
        with self._readable(), self._image as image:
            return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB")))

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            cause = "it can't be decoded as an image"
            raise _unreadable(self.path, "image", cause) from error


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
