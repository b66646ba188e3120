"""Valid and damaged video and image files."""

import os
import signal
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch

from nemo_care.data.media import Media, MediaRequest, measure_media

_ROTATED = {
    90: (0, 65536, 0, -65536, 0, 0),
    180: (-65536, 0, 0, 0, -65536, 0),
    270: (0, -65536, 0, 65536, 0, 0),
}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a gradient with noise, uint8 [H, W, 3]."""
    gradient = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    noise = np.random.default_rng(seed).integers(0, 80, (height, width, 3))
    return ((gradient + noise) % 256).astype(np.uint8)


def encode_video(path: Path, frames: np.ndarray, rate: int, **options: str) -> Path:
    """Write an ordinary H.264 file with its index first, so that the rest can be damaged."""
    return encode(path, frames, rate, "libx264", container={"movflags": "faststart"}, **options)


def numbered(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Return frames that show their number, from 0 to 49, as a grey that survives any codec."""
    greys = 5 * np.arange(count, dtype=np.uint8) + 5
    return np.broadcast_to(greys[:, None, None, None], (count, height, width, 3)).copy()


def numbers_of(frames: torch.Tensor) -> list[int]:
    """Return the numbers of decoded frames of `numbered`."""
    return ((frames.float().mean(dim=(1, 2, 3)) - 5) / 5).round().int().tolist()


def encode(
    path: Path,
    frames: np.ndarray,
    rate: int,
    codec: str,
    pix_fmt: str = "yuv420p",
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Write a file of any kind: the container by the path's suffix and options, and the codec's."""
    with av.open(str(path), "w", options=container) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path


def remux(
    source: Path, path: Path, change: Callable[[int, av.Packet], bool | None] = lambda n, p: None
) -> Path:
    """Write the same packets to another file; `change` may alter each, or drop it by False.

    Its arguments are the packet and its place.
    """
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(p for p in old.demux(video=0) if p.size):
            if change(number, packet) is not False:
                packet.stream = stream
                new.mux(packet)
    return path


def show_only(path: Path, first: float, seconds: float) -> Path:
    """Make an mp4 file's edit list show only this part, like cutting without encoding."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        ticks = round(1 / container.streams.video[0].time_base)
    # elst: version and flags, number of entries, then duration and start of the first; movies are
    # written with 1000 ticks per second.
    entry = content.index(b"elst") + 4 + 4 + 4
    (start,) = struct.unpack(">I", content[entry + 4 : entry + 8])
    content[entry : entry + 8] = struct.pack(
        ">II", round(1000 * seconds), start + round(ticks * first)
    )
    path.write_bytes(content)
    return path


def encode_at_times(
    path: Path,
    frames: np.ndarray,
    times: Iterable[Fraction],
    *,
    codec: str = "libx264",
    rate: int = 30,
) -> Path:
    """Write a file that shows its frames at these times, in seconds, and declares this rate."""
    base = Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        for frame, time in zip(frames, times, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = int(time / base), base
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return path


def rotate(path: Path, degrees: int) -> Path:
    """Make an mp4 file be shown rotated clockwise, as telephones do."""
    content = bytearray(path.read_bytes())
    # tkhd: version and flags, 5 numbers, 8 reserved bytes, 4 short numbers, then the matrix.
    matrix = content.index(b"tkhd") + 4 + 4 + 5 * 4 + 8 + 4 * 2
    content[matrix : matrix + 36] = struct.pack(">9i", *_ROTATED[degrees], 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def encode_audio(path: Path) -> Path:
    """Write a file with a second of silence and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        silence = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def damaged_video(path: Path, damage: str) -> Path:
    """Write an unusable video, damaged in one of the ways of DAMAGES."""
    frames = np.stack([picture(56, 56, seed) for seed in range(1 if damage == "short" else 16)])
    if damage == "missing":
        return path
    if damage == "audio":
        return encode_audio(path)
    if damage == "timestamps":
        # Two recordings concatenated, whose clocks both begin at 0.
        parts = [encode_video(path.with_suffix(f".{n}.ts"), frames, 4) for n in range(2)]
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
        return path
    content = encode_video(path, frames, 4).read_bytes()
    middle = len(content) // 2
    noise = np.random.default_rng(0).bytes(len(content) - middle)
    damages = {
        "empty": b"",
        "text": b"this is not a video\n" * 50,
        "picture": b"\xff\xd8\xff\xe0" + noise,
        "cut off": content[: len(content) // 3],
        "cut at the end": content[:-200],
        "overwritten": content[:middle] + noise,
        "short": content,
    }
    path.write_bytes(damages[damage])
    return path


DAMAGES = {
    "missing": "there is no such file",
    "empty": "the file is empty",
    "text": "can't be opened",
    "picture": "can't be opened",
    "audio": "can't be opened as a video: it holds no video",
    "cut off": "can't be read to its end: of the 16 frames in its index, 4 are there",
    "cut at the end": "can't be read to its end: of the 16 frames in its index, 15 are there",
    "overwritten": "its h264 frames can't be decoded (",
    "short": "it has 1 frame",
    "timestamps": "several frames have the same timestamp",
}
"""Ways to damage a video, with the resulting error."""


def same_media(one: Media, other: Media) -> bool:
    """Whether both hold the same, frames included."""
    pairs = zip(one.frames, other.frames, strict=True)
    alike = all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)
    return alike and replace(one, frames=[]) == replace(other, frames=[])


def load_or_misbehave(request: MediaRequest) -> Media:
    """Load media, or as a file named "hang" or "crash" demands; for decoding processes."""
    names = {path.stem for path in request.videos}
    if "hang" in names:
        time.sleep(600)
    if "crash" in names:
        os.kill(os.getpid(), signal.SIGSEGV)
    return measure_media(request)
