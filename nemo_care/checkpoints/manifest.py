"""What a checkpoint's files have to be: `manifest.json`, with the size and the SHA-256 of each.

It is written last, so a checkpoint that has one was complete. The checksum finds accidents: a file
cut short, bits that a disk turned. It is SHA-256 because processors have instructions for it: of
the checksums of Python's standard library that tell every changed bit it was the fastest (1.4 GB/s
a core, against 0.7 of crc32), and `sha256sum` checks a file without this program.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_care.errors import DamagedCheckpoint
from nemo_care.files.json_lines import sync_folder

NAME = "manifest.json"
_PIECE = 16 << 20  # bytes read at a time


@dataclass(frozen=True)
class FileRecord:
    """What one file of a checkpoint has to be.

    `part` is the part of the state (`policy`, `optimizer`, `reference`) that it holds; None for a
    file that every reader needs.
    """

    bytes: int
    sha256: str
    part: str | None = None


class HashedFile(io.RawIOBase):
    """A new file that is written from its start to its end; on the disk once it is closed."""

    def __init__(self, path: Path, part: str | None = None) -> None:
        """Raises OSError where the file exists or can't be made."""
        self._part = part
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._file = path.open("xb")

    def write(self, data: Any) -> int:
        """Append bytes."""
        view = memoryview(data)
        self._file.write(view)
        self._hash.update(view)
        self._bytes += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Bytes so far."""
        return self._bytes

    def close(self) -> None:
        """Wait until the disk has everything."""
        if self.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
            super().close()

    def record(self) -> FileRecord:
        """What was written."""
        return FileRecord(self._bytes, self._hash.hexdigest(), self._part)


def write_file(path: Path, content: bytes) -> FileRecord:
    """Write a small file of a checkpoint."""
    with HashedFile(path) as file:
        file.write(content)
    return file.record()


def read_record(file: Path) -> FileRecord:
    """What a file that others wrote is now."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    return FileRecord(file.stat().st_size, _sha256(file))


def write_manifest(folder: Path, files: Mapping[str, FileRecord], about: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint whose files are all there."""
    records = {name: asdict(files[name]) for name in sorted(files)}
    content = json.dumps({**about, "files": records}, indent=1) + "\n"
    write_file(folder / NAME, content.encode())
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The files of a checkpoint, by name.

    Raises:
        DamagedCheckpoint: there is no manifest, or none that can be read.
    """
    file = folder / NAME
    if not file.is_file():
        raise DamagedCheckpoint(
            f"{file}: missing; the checkpoint was not completed, or an older version wrote it"
        )
    try:
        files = json.loads(file.read_bytes())["files"]
        return {name: FileRecord(**record) for name, record in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DamagedCheckpoint(f"{file}: not a manifest ({error})") from error


def check_sizes(folder: Path, files: Mapping[str, FileRecord]) -> None:
    """Check that all files are there and as long as they were written; reads none of them.

    Raises:
        DamagedCheckpoint: names the first that is not.
    """
    for name, record in files.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise DamagedCheckpoint(f"{folder / name}: {error.strerror}") from error
        if size != record.bytes:
            raise DamagedCheckpoint(f"{folder / name}: {size} bytes, {record.bytes} were written")


def find_changed(folder: Path, files: Mapping[str, FileRecord]) -> str | None:
    """Read the files; what is wrong with the first that is not as it was written."""
    for name, record in files.items():
        try:
            same = _sha256(folder / name) == record.sha256
        except OSError as error:
            return f"{folder / name}: {error.strerror}"
        if not same:
            return f"{folder / name}: its content changed since it was written (SHA-256)"
    return None


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb", buffering=0) as opened:
        while piece := opened.read(_PIECE):
            found.update(piece)
    return found.hexdigest()
