"""Video files as frames.

A `VideoFile` knows how many frames of which size it will give before it has decoded them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nemo_care.data.media_errors import check_file, library_reason, unreadable

if TYPE_CHECKING:
    from nemo_care.data.video_readers import DecordReader, PyavReader
    from nemo_care.data.video_times import Timeline

# Two frames share a temporal patch, so frame counts are even.
FRAME_FACTOR = 2


@dataclass(frozen=True)
class FrameChoice:
    """How many frames of a video the model sees."""

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 16

    def indices(self, timeline: "Timeline") -> list[int]:
        """Indices of the frames to read of a video of at least 2 frames."""
        indices = choose_frames(len(timeline.starts), timeline.rate, self)
        if timeline.constant:
            return indices
        return frames_shown_at(timeline.starts, len(indices))


@dataclass(frozen=True)
class FrameTimes:
    """The frames that were shown at these seconds, such as those that a run has recorded."""

    seconds: tuple[float, ...]

    def indices(self, timeline: "Timeline") -> list[int]:
        """Indices of the frames whose times are nearest."""
        distances = np.abs(np.subtract.outer(np.array(self.seconds), timeline.starts))
        return distances.argmin(axis=1).tolist()


def choose_frames(total: int, average_fps: float, choice: FrameChoice) -> list[int]:
    """Indices of the frames to read, evenly spread (the rule of `smart_nframes`).

    About `choice.fps` frames per second, within min_frames, max_frames and `total`, an even count.
    Needs at least 2 frames in total.
    """
    least = -(-choice.min_frames // FRAME_FACTOR) * FRAME_FACTOR
    wanted = min(max(total / average_fps * choice.fps, least), choice.max_frames, total)
    count = max(int(wanted // FRAME_FACTOR), 1) * FRAME_FACTOR
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def frames_shown_at(starts: np.ndarray, count: int) -> list[int]:
    """Indices of `count` different frames, those shown at evenly spread times.

    `starts` [frames] are the increasing times at which the frames appear. A frame that is shown at
    several of the times is followed by the next ones, so that each index occurs once.
    """
    times = np.linspace(starts[0], starts[-1], count)
    indices = np.searchsorted(starts, times + 1e-6, side="right") - 1
    order = np.arange(count)
    indices = np.maximum.accumulate(indices - order) + order
    return np.minimum(indices, len(starts) - count + order).tolist()


class VideoFile:
    """A video whose first frame has been decoded, and no other yet.

    `count` frames of `height` x `width` pixels, turned as the file's rotation says, will be read;
    `seconds_per_grid` is the time that one temporal patch covers, `prompt_times` are the seconds
    from the first frame of the file to each of those that are read. `by_pyav` says that PyAV
    decodes the frames, because decord can't or would return the wrong ones.
    """

    def __init__(self, path: str | Path, choice: FrameChoice | FrameTimes) -> None:
        """Open the file; `choice` says which frames will be read.

        Raises:
            MissingMedia: there is no such file.
            UnreadableMedia: it is empty, not a video, broken, has fewer than two frames, or frames
                whose timestamps contradict each other.
        """
        # These load two copies of ffmpeg; only processes that decode need them.
        import av

        from nemo_care.data.video_times import UnusableVideo, read_timeline

        self.path = Path(path)
        self._errors = (UnusableVideo, av.FFmpegError)
        check_file(self.path, "video")
        try:
            self._timeline = read_timeline(self.path)
        except UnusableVideo as error:
            raise unreadable(self.path, "video", str(error)) from error
        except av.FFmpegError as error:
            cause = f"it can't be opened as a video ({library_reason(error)})"
            raise unreadable(self.path, "video", cause) from error
        starts, rate = self._timeline.starts, self._timeline.rate
        total = len(starts)
        if total < FRAME_FACTOR:
            cause = f"it has {total} frame(s), at least {FRAME_FACTOR} are needed"
            raise unreadable(self.path, "video", cause)
        self._indices = choice.indices(self._timeline)
        self.count = len(self._indices)
        if self._timeline.constant:
            # The starts are rounded to the file's time base.
            self.prompt_times = tuple(index / rate for index in self._indices)
        else:
            self.prompt_times = tuple((starts[self._indices] - starts[0]).tolist())
        self.seconds_per_grid = FRAME_FACTOR / (self.count / total * rate)
        self.by_pyav = not self._timeline.plain
        self._reader: DecordReader | PyavReader | None = None
        self._first = self._read(self._indices[0])
        self.height, self.width = self._first.shape[:2]

    @property
    def frame_times(self) -> tuple[float, ...]:
        """Seconds at which the frames appear, to the millisecond."""
        return tuple(round(float(self._timeline.starts[index]), 3) for index in self._indices)

    def frames(self) -> Iterator[Tensor]:
        """The frames, uint8 [H, W, 3] each, decoded one by one.

        Raises:
            UnreadableMedia: one can't be decoded.
        """
        yield self._first
        for index in self._indices[1:]:
            frame = self._read(index)
            if frame.shape != self._first.shape:
                cause = f"its frames change size, from {_size(self._first)} to {_size(frame)}"
                raise unreadable(self.path, "video", cause)
            yield frame

    def _read(self, index: int) -> Tensor:
        """One frame, by decord if it can and by PyAV from the first frame on that it can't."""
        from nemo_care.data.video_readers import DecordReader, PyavReader

        if not self.by_pyav:
            try:
                self._reader = self._reader or DecordReader(self.path, self._timeline)
                return torch.from_numpy(self._reader.at(index))
            except self._errors:
                self._reader, self.by_pyav = None, True
        try:
            self._reader = self._reader or PyavReader(self.path, self._timeline)
            return torch.from_numpy(self._reader.at(index))
        except self._errors as error:
            cause = f"its {self._timeline.codec} frames can't be decoded ({library_reason(error)})"
            raise unreadable(self.path, "video", cause) from error


def _size(frame: Tensor) -> str:
    return f"{frame.shape[1]}x{frame.shape[0]}"
