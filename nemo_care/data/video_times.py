"""Find out which frames of a video file are shown, and when.

A container's frame count and frame rate are often wrong, so neither is trusted: the times come from
the packets, which are read without decoding them. If the packets don't show which frames there will
be (no times, a start between two key frames, ...), every frame is decoded once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from nemo_care.data.media_errors import library_reason

# decord seeks by time, and in containers without an index of key frames (MPEG-TS, MPEG-PS) it
# returns frames from a different place than requested.
_DECORD_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
# AVI has no presentation times, and those of ASF are not reliable: ffmpeg guesses them.
_UNTIMED_CONTAINERS = ("avi", "asf")
_NOT_MOVING = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image


class UnusableVideo(Exception):
    """The frames or times of a video can't be determined; the message has the reason."""


@dataclass(frozen=True)
class Timeline:
    """The frames of a video that are shown, in order.

    Attributes:
        codec: name of the codec.
        starts: float64 [frames], the seconds at which each frame appears, increasing.
        rate: frames per second over the whole video, the last frame's duration included.
        constant: whether every frame is within half a frame of its place at that rate.
        pts: those of the frames, in the stream's time base; None if the file has no times.
        places: of each shown frame among all frames that the decoder returns; None if the packets
            alone were sufficient.
        key_pts: of the key frames, increasing; a decoder can begin at any of them.
        plain: whether decord returns exactly these frames.
    """

    codec: str
    starts: np.ndarray
    rate: float
    constant: bool
    pts: list[int] | None
    places: list[int] | None
    key_pts: list[int]
    plain: bool


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open the container and its moving video stream; raises the errors of `open_video`."""
    container, stream = open_video(path)
    with container:
        yield container, stream


def open_video(path: Path) -> tuple[InputContainer, VideoStream]:
    """Open the container and its moving video stream, ready to decode in this thread.

    Raises:
        UnusableVideo: it has no moving video, or there is no decoder for it.
        av.FFmpegError: it can't be opened.
    """
    # "file:" because the name may contain a colon; the file must not lead to network access.
    container = av.open(
        f"file:{path}", metadata_errors="replace", options={"protocol_whitelist": "file"}
    )
    try:
        stream = _moving_stream(container)
    except UnusableVideo:
        container.close()
        raise
    # dav1d and others start one thread per core by default, but decoding already has processes.
    stream.codec_context.thread_count = 1
    return container, stream


def decoded(packets: Iterator[Packet]) -> Iterator[VideoFrame]:
    """Yield the frames that the decoder returns for these packets, in display order.

    Raises:
        av.FFmpegError: one can't be decoded.
    """
    begun = False
    for packet in packets:
        begun = begun or packet.is_keyframe  # earlier packets can't be decoded
        if begun and not packet.is_corrupt:
            yield from packet.decode()


def read_timeline(path: Path) -> Timeline:
    """Return when each frame of a file is shown.

    Raises:
        UnusableVideo: it has no video, its end is missing, its frames' times contradict each other,
            or frames that have to be decoded in order to count them can't be decoded.
        av.FFmpegError: it can't be opened.
    """
    with opened(path) as (container, stream):
        entries = _entries(container, stream)
        indexed = len(stream.index_entries)
        whole = sum(not entry.is_corrupt for entry in entries)
        if indexed > whole:
            raise UnusableVideo(
                f"it can't be read to its end: of the {indexed} frames in its index, "
                f"{whole} are there"
            )
        pts: list[int] | None
        places: list[int] | None = None
        timed = container.format.name not in _UNTIMED_CONTAINERS
        if timed and _suffice(entries, reorders=stream.codec_context.has_b_frames):
            shown = sorted((e.pts, e.duration) for e in entries if e.shown and e.pts is not None)
            pts, durations = [pts for pts, _ in shown], [duration for _, duration in shown]
        else:
            pts, durations, places = _times_by_decoding(path)
        if pts is None:
            starts, rate, constant = _nominal_times(len(durations), stream.guessed_rate)
        else:
            base = stream.time_base or Fraction(1)
            starts = np.array(pts) * float(base)
            rate, constant = _rate(
                starts, np.array(durations) * float(base), float(stream.average_rate or 0)
            )
        plain = (
            places is None
            and container.format.name in _DECORD_CONTAINERS
            and len(container.streams.video) == 1
            and _decord_counts_right(entries)
        )
        keys = sorted(e.pts for e in entries if e.is_key and e.pts is not None)
        codec = codec_name(stream)
    return Timeline(codec, starts, rate, constant, pts, places, keys, plain)


def codec_name(stream: VideoStream) -> str:
    """Return the codec's name, whichever library decodes it."""
    return stream.codec_context.codec.canonical_name


def _moving_stream(container: InputContainer) -> VideoStream:
    streams = container.streams.video
    moving = [stream for stream in streams if not stream.disposition & _NOT_MOVING]
    if container.format.name.endswith("_pipe"):  # jpeg_pipe and similar: files of one picture
        moving = []
    if not moving:
        held = "a still picture only" if streams else "no video"
        raise UnusableVideo(f"it can't be opened as a video: it holds {held}")
    best = container.streams.best("video")
    stream = next((stream for stream in moving if stream == best), moving[0])
    if stream.codec_context is None:
        raise UnusableVideo("it can't be opened as a video: there is no decoder for its codec")
    return stream


class _Entry(NamedTuple):
    """One packet's information about its frame; `shown` is False if it is never seen."""

    pts: int | None
    dts: int | None
    duration: int
    is_key: bool
    is_corrupt: bool
    shown: bool


def _entries(container: InputContainer, stream: VideoStream) -> list[_Entry]:
    """Return an entry per packet, in decoding order; long videos have 100,000 of them."""
    is_vp8 = codec_name(stream) == "vp8"
    entries = []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        pts = packet.pts
        # An edit list hides frames needed only to decode the first shown one: before time 0.
        hidden = packet.is_discard or (pts is not None and pts < 0)
        # show_frame in the frame tag (RFC 6386, 9.1): alternate reference frames have 0.
        if is_vp8 and not bytes(packet)[0] & 0x10:
            hidden = True
        entries.append(
            _Entry(
                pts,
                packet.dts,
                packet.duration or 0,
                packet.is_keyframe,
                packet.is_corrupt,
                not hidden,
            )
        )
    return entries


def _suffice(entries: list[_Entry], *, reorders: bool) -> bool:
    """Whether each shown packet gives one frame, shown at the packet's time.

    `reorders`: the decoding order of frames may differ from their display order.
    """
    pts = [entry.pts for entry in entries if entry.shown and entry.pts is not None]
    if not pts or any(entry.pts is None or entry.is_corrupt for entry in entries):
        return False
    first = entries[0]
    if not first.is_key or min(pts) < (first.pts or 0):
        return False  # packets before the first key frame can't be decoded
    if len(set(pts)) < len(pts):
        return False
    if not reorders and pts != sorted(pts):
        return False
    return all(e.dts is None or e.pts is None or e.dts <= e.pts for e in entries)


def _decord_counts_right(entries: list[_Entry]) -> bool:
    """Whether decord's number of each frame is its number in display order.

    decord treats all packets as shown frames, and a key frame's number among the packets as its
    number in the display. Frames that are stored after a key frame but shown before it (an open
    group of pictures, common in HEVC) make these differ, and then decord seeks wrong frames.
    """
    if not all(entry.shown for entry in entries):
        return False
    latest = -1
    for entry in entries:
        assert entry.pts is not None, "packets without times do not suffice"
        if entry.pts < latest:
            return False
        if entry.is_key:
            latest = entry.pts
    return True


def _times_by_decoding(path: Path) -> tuple[list[int] | None, list[int], list[int]]:
    """Return times, durations and places of the shown frames; times are None without any."""
    pts: list[int | None] = []
    durations, places = [], []
    with opened(path) as (container, stream):
        codec = codec_name(stream)
        try:
            for place, frame in enumerate(decoded(container.demux(stream))):
                if frame.is_corrupt or (frame.pts is not None and frame.pts < 0):
                    continue
                pts.append(frame.pts)
                durations.append(frame.duration or 0)
                places.append(place)
        except av.FFmpegError as error:
            cause = f"its {codec} frames can't be decoded ({library_reason(error)})"
            raise UnusableVideo(cause) from error
    times = [time for time in pts if time is not None]
    if not times:
        return None, durations, places
    if len(times) < len(pts):
        raise UnusableVideo(
            f"{len(pts) - len(times)} of its {len(pts)} frames have no time; encode it again"
        )
    steps = set(np.diff(sorted(times)).tolist())
    if 0 in steps:
        # For example, files concatenated from others whose clocks each begin at 0.
        raise UnusableVideo(
            "several frames have the same timestamp, so which is which can't be known; "
            "encode it again"
        )
    # Evenly spaced times are unambiguous: the decoder returns frames in display order.
    if times != sorted(times) and len(steps) > 1:
        raise UnusableVideo("its frames' times are in the wrong order; encode it again")
    return sorted(times), durations, places


def _nominal_times(count: int, rate: Fraction | None) -> tuple[np.ndarray, float, bool]:
    """Return starts, rate and whether it is constant, if only a frame rate is known."""
    if not rate or rate <= 0:
        raise UnusableVideo("its frames have no times, and it has no frame rate; encode it again")
    return np.arange(count) / float(rate), float(rate), True


def _rate(starts: np.ndarray, durations: np.ndarray, declared: float) -> tuple[float, bool]:
    """Return frames per second over the whole video, and whether the frames keep to it.

    The declared rate is used if the times, which are rounded to the time base, agree with it.
    """
    if declared > 0 and _keeps_to(starts, declared):
        return declared, True
    if len(starts) < 2:
        return 1.0, True
    span = float(starts[-1] - starts[0])
    mean = span / (len(starts) - 1)
    # Some files give each frame the duration of the declared rate, however long it is shown.
    believable = 0.5 < durations[:-1].sum() / span < 2 and durations[-1] > 0
    last = float(durations[-1]) if believable else mean
    return len(starts) / (span + last), _keeps_to(starts, 1 / mean)


def _keeps_to(starts: np.ndarray, rate: float) -> bool:
    places = (starts - starts[0]) * rate
    return bool((np.abs(places - np.arange(len(starts))) < 0.5).all())
