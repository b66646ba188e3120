"""The two libraries that decode videos, with one interface: frame number `index` as an array.

decord reads ordinary files. PyAV, with its newer ffmpeg, reads the rest: codecs that decord does
not support, and files in which decord counts frames that are never shown.
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from PIL import Image

from nemo_care.data.images import on_white
from nemo_care.data.video_times import Timeline, UnusableVideo, decoded, open_video


class DecordReader:
    """Frames of a file that is `Timeline.plain`."""

    def __init__(self, path: Path, timeline: Timeline) -> None:
        """Raises UnusableVideo if decord can't open the file, or counts a different number."""
        import decord  # imported here, so that a check of the machine reports if it fails

        self._errors = (RuntimeError, AssertionError, decord.DECORDError)
        try:
            self._reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        except self._errors as error:
            raise UnusableVideo(str(error)) from error
        if len(self._reader) != len(timeline.starts):
            raise UnusableVideo(f"{len(self._reader)} frames instead of {len(timeline.starts)}")

    def at(self, index: int) -> np.ndarray:
        """Return frame `index`, uint8 [H, W, 3]; raises UnusableVideo."""
        try:
            frame = self._reader[index].asnumpy()
        except self._errors as error:
            raise UnusableVideo(str(error)) from error
        if frame.shape[2] != 3:  # in narrow frames, decord mistakes row padding for colours
            raise UnusableVideo(f"frames of shape {frame.shape}")
        return frame


class PyavReader:
    """Frames of any file that has a timeline; fastest if read in order."""

    def __init__(self, path: Path, timeline: Timeline) -> None:
        """Open the file; raises the errors of `open_video`."""
        self._path = path
        self._timeline = timeline
        self._last = -1
        self._rewind()

    def at(self, index: int) -> np.ndarray:
        """Return frame `index`, uint8 [H, W, 3], rotated by the file's metadata.

        Raises:
            UnusableVideo: the decoder does not return it.
            av.FFmpegError: it can't be decoded.
        """
        if index <= self._last:
            self._rewind()
        elif self._timeline.places is None:
            self._jump(index)
        self._last = index
        for place, frame in self._frames:
            here, wanted = self._position(place, frame, index)
            if here == wanted and not frame.is_corrupt:
                return _rgb(frame)
            if here is not None and here >= wanted:
                break
        raise UnusableVideo(f"the frame at {self._timeline.starts[index]:.2f} s is damaged")

    def _position(self, place: int, frame: VideoFrame, index: int) -> tuple[int | None, int]:
        """Return the positions of the decoded frame and the wanted one, as place or time."""
        places, pts = self._timeline.places, self._timeline.pts
        if places is not None:
            return place, places[index]
        assert pts is not None, "packets without times do not suffice"
        return frame.pts, pts[index]

    def _rewind(self) -> None:
        self._container, self._stream = open_video(self._path)
        self._last = -1
        self._frames: Iterator[tuple[int, VideoFrame]] = enumerate(
            decoded(self._container.demux(self._stream))
        )

    def _jump(self, index: int) -> None:
        """Continue from the last key frame before frame `index`, if that is further ahead."""
        pts = self._timeline.pts
        assert pts is not None, "packets without times do not suffice"
        keys = self._timeline.key_pts
        key = keys[bisect_right(keys, pts[index]) - 1]
        if key <= (pts[self._last] if self._last >= 0 else keys[0]):
            return
        try:
            self._container.seek(key, stream=self._stream)
            packets = self._container.demux(self._stream)
            first = next(packets)
        except (av.FFmpegError, StopIteration):
            self._rewind()
            return
        # Not every container can seek there; all can seek to the beginning.
        if not first.is_keyframe or first.pts is None or first.pts > pts[index]:
            self._rewind()
            return
        self._frames = enumerate(decoded(chain([first], packets)))


def _rgb(frame: VideoFrame) -> np.ndarray:
    if any(component.is_alpha for component in frame.format.components):
        pixels = np.asarray(on_white(Image.fromarray(frame.to_ndarray(format="rgba"), "RGBA")))
    else:
        pixels = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))
