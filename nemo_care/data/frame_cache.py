"""Decoded frames in files, so that runs over the same videos decode them once.

An entry is one file, named by what its frames depend on. It is written under another name and
renamed, so processes of any machine can share the folder without locks, and its checksum is
compared when it is read: a damaged entry counts as missing, and is replaced.
"""

import hashlib
import json
import os
import sys
import time
import uuid
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from nemo_care.data.patches import Grid
from nemo_care.errors import InputError
from nemo_care.process.screen import say
from nemo_care.recipe.data import DataConfig

# Of this layout of an entry, and of how frames are chosen and resized.
_VERSION = 2
_ENTRY, _PARTIAL = ".frames", ".partial"
# When an entry that is still partial has no writer any more: it was killed.
_ABANDONED_SECONDS = 3600.0
# A process looks how large the folder is after writing this share of the limit, and makes room up
# to this share: others write meanwhile.
_LOOK_EVERY, _ROOM = 1 / 64, 1 / 8


@dataclass(frozen=True)
class DecodedFile:
    """The resized frames of one video or image, uint8 [count, H, W, 3], and what goes with them.

    `grid` is that of their patches, `seconds_per_grid` the time that one step of it covers (0.0 for
    an image), `frame_times` the seconds at which the frames of a video appear, `prompt_times` those
    since its first frame. `by_pyav`: decord could not read the video, and PyAV did.
    """

    grid: Grid
    seconds_per_grid: float
    frames: np.ndarray
    by_pyav: bool = False
    frame_times: tuple[float, ...] = ()
    prompt_times: tuple[float, ...] = ()


@dataclass(frozen=True)
class CacheSettings:
    """The folder, and how many bytes its entries may have."""

    folder: Path
    limit: int

    @classmethod
    def of(cls, data: DataConfig) -> "CacheSettings | None":
        """As the recipe says; None without data.cache."""
        return None if data.cache is None else cls(Path(data.cache), int(data.cache_gib * 2**30))


@lru_cache
def open_cache(settings: CacheSettings) -> "FrameCache":
    """The cache of these settings, one per process."""
    return FrameCache(settings.folder, settings.limit)


def check_cache(data: DataConfig) -> None:
    """Make the folder of data.cache.

    Raises:
        InputError: it can't be made or written to.
    """
    if data.cache is None:
        return
    folder = Path(data.cache)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{uuid.uuid4().hex}{_PARTIAL}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"data.cache={data.cache}: can't be written to ({error.strerror}); name another "
            "folder, or leave the key out"
        ) from error


class FrameCache:
    """Entries by name in a folder; the least recently used ones are removed beyond `limit` bytes.

    The limit holds up to what several processes write before one of them looks at the folder again:
    a 64th of it each.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        """The folder need not exist."""
        self.folder = folder
        self.limit = limit
        # Of all entries when this process last looked, and what it has written since; unknown.
        self._size: int | None = None
        self._written = 0
        self._has_failed = False

    @staticmethod
    def name(path: Path, *described: object) -> str | None:
        """The name of a file's entry; `described` is what its frames depend on besides the file.

        None where there is no such file.
        """
        try:
            stat = path.stat()
            file = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
        except OSError:
            return None
        content = json.dumps([_VERSION, *file, *map(repr, described)])
        return hashlib.sha256(content.encode()).hexdigest()

    def get(self, name: str) -> DecodedFile | None:
        """The entry, None where there is none or it is damaged."""
        path = self._path(name)
        try:
            entry = _read(path, name)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say_once(error)
            return None
        except (ValueError, KeyError, TypeError) as error:
            say(
                f"{path}: not a readable entry of data.cache ({error}); it is decoded again",
                file=sys.stderr,
            )
            return None
        # Entries are removed in the order of this time; it can't be set on another user's files.
        with suppress(OSError):
            os.utime(path)
        return entry

    def put(self, name: str, entry: DecodedFile) -> None:
        """Keep an entry, in place of one of the same name.

        One that can't be written, for example because the disk is full, is left out.
        """
        path = self._path(name)
        header = _header(name, entry)
        size = len(header) + entry.frames.nbytes
        if size > self.limit:
            return
        try:
            self._make_room(size)
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, header, np.ascontiguousarray(entry.frames))
            self._written += size
        except OSError as error:
            self._say_once(error)

    def _say_once(self, error: OSError) -> None:
        if not self._has_failed:
            say(
                f"data.cache={self.folder}: can't be used ({error.strerror}); this process goes on "
                "without it",
                file=sys.stderr,
            )
        self._has_failed = True

    def _path(self, name: str) -> Path:
        """In one of 256 folders, because some file systems are slow with very large ones."""
        return self.folder / name[:2] / f"{name}{_ENTRY}"

    def _make_room(self, more: int) -> None:
        """Remove the entries that were not used for the longest time, if `more` bytes need it."""
        if self._size is not None:
            fits = self._size + self._written + more <= self.limit
            if fits and self._written + more <= self.limit * _LOOK_EVERY:
                return
        found = sorted(self._entries())
        self._size, self._written = sum(size for _, size, _ in found), 0
        if self._size + more <= self.limit:
            return
        for _, size, path in found:
            if self._size + more <= self.limit * (1 - _ROOM) or self._size == 0:
                break
            path.unlink(missing_ok=True)
            self._size -= size

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """When each entry was last used, its bytes and its path; what a kill left is removed."""
        for path in self.folder.glob("??/*"):
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process has removed it
                continue
            if path.suffix == _PARTIAL and time.time() - stat.st_mtime > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
            elif path.suffix == _ENTRY:
                yield stat.st_mtime, stat.st_size, path


def _header(name: str, entry: DecodedFile) -> bytes:
    """One line of JSON in front of the frames' bytes."""
    about = {
        "name": name,
        "grid": entry.grid,
        "seconds_per_grid": entry.seconds_per_grid,
        "by_pyav": entry.by_pyav,
        "frame_times": entry.frame_times,
        "prompt_times": entry.prompt_times,
        "shape": entry.frames.shape,
        "crc32": zlib.crc32(np.ascontiguousarray(entry.frames).data),
    }
    return json.dumps(about).encode() + b"\n"


def _write(path: Path, header: bytes, frames: np.ndarray) -> None:
    """An entry under its name, whole or not at all."""
    partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex}{_PARTIAL}")
    try:
        with partial.open("xb") as file:
            file.write(header)
            file.write(frames.data)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _read(path: Path, name: str) -> DecodedFile:
    """An entry; raises OSError, ValueError, KeyError or TypeError where it is damaged."""
    with path.open("rb") as file:
        about = json.loads(file.readline())
        frames = np.fromfile(file, dtype=np.uint8).reshape(about["shape"])
    if about["name"] != name or zlib.crc32(frames.data) != about["crc32"]:
        raise ValueError("its checksum differs")
    t, h, w = about["grid"]
    return DecodedFile(
        (t, h, w),
        float(about["seconds_per_grid"]),
        frames,
        bool(about["by_pyav"]),
        tuple(map(float, about["frame_times"])),
        tuple(map(float, about["prompt_times"])),
    )
