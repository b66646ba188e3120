"""Read a checkpoint without running code that it can contain.

torch's distributed checkpoints have an index, `.metadata`, that `pickle.load` reads, and objects
that torch loads without restriction. A pickle can call anything that Python can import. Therefore
the index is only read with a list of the classes that occur in an index, and every object as
tensors and plain values: before loading, which names the fault in one line, and by the loading
itself (`load`), since another process can change the files in between.
"""

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem

from nemo_care.errors import DamagedCheckpoint, InputError, first_line

_INDEX = ".metadata"
_COMMON = "common.pt"
_METADATA = "torch.distributed.checkpoint.metadata"
# Names that occur in the indices that we write; torch's dtypes in addition.
_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        (_METADATA, name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties"),
            *("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata"),
            "_MEM_FORMAT_ENCODING",
        )
    ),
}


class _Foreign(Exception):
    """Raised for a name that does not occur in our checkpoints."""


class _IndexReader(pickle.Unpickler):
    """Unpickles an index, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise _Foreign(f"{module}.{name}")


def read_index(checkpoint: Path) -> Metadata:
    """Read the index of a checkpoint without running anything in it.

    Raises:
        InputError: the file contains what no checkpoint of nemo-care does; DamagedCheckpoint if it
        can't be read at all.
    """
    file = checkpoint / _INDEX
    try:
        with file.open("rb") as opened:
            index = _IndexReader(opened).load()
    except _Foreign as error:
        raise _not_ours(file, str(error)) from error
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: {error.strerror}") from error
    # Torn bytes can raise any error of the pickle machine.
    except Exception as error:
        raise DamagedCheckpoint(f"{file}: not the index of a checkpoint ({error})") from error
    if not isinstance(index, Metadata):
        raise InputError(f"{file} holds a {type(index).__name__}, not a checkpoint's index")
    _check_places(file, index)
    return index


def _check_places(file: Path, index: Metadata) -> None:
    """Reject an index that would load different bytes than those that are checked.

    torch decodes a place's bytes with its transforms (zstandard's, or those of an extension) before
    it unpickles them; our checkpoints have none.
    """
    if type(index.state_dict_metadata) is not dict or type(index.storage_data) is not dict:
        raise _not_ours(file, "no tensors and places")
    for key, place in index.storage_data.items():
        if type(key) is not MetadataIndex or type(place) is not _StorageInfo:
            raise _not_ours(file, f"a {type(place).__name__} for {key!r}")
        name = place.relative_path
        if place.transform_descriptors:
            raise _not_ours(file, f"{key.fqn} to be decoded ({place.transform_descriptors!r})")
        if type(name) is not str or name != os.path.basename(name) or name in ("", ".", ".."):
            raise _not_ours(file, f"{key.fqn} in {name!r}, outside of the checkpoint")
        numbers = (place.offset, place.length)
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise _not_ours(file, f"{key.fqn} at bytes {numbers!r}")


def _not_ours(file: Path, what: str) -> InputError:
    return InputError(f"{file} names {what}: not a checkpoint that nemo-care wrote")


def check_pickles(checkpoint: Path) -> None:
    """Reject a checkpoint that would run code when it is loaded.

    Raises:
        InputError: names the file and its unexpected content (see `read_index`).
    """
    index = read_index(checkpoint)
    read_common(checkpoint)
    assert index.storage_data is not None  # checked by read_index
    for key, place in index.storage_data.items():
        file = checkpoint / place.relative_path
        if isinstance(index.state_dict_metadata.get(key.fqn), BytesStorageMetadata):
            _load_tensors_only(file, place.offset, place.length)
        elif place.offset + place.length > _size(file):
            raise _not_ours(checkpoint / _INDEX, f"bytes after the end of {file.name}")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: {error.strerror}") from error


def read_common(checkpoint: Path) -> dict[str, Any]:
    """Read the part of a checkpoint's state that is not tensors, without running anything.

    Raises:
        InputError: see `check_pickles`.
    """
    common = _load_tensors_only(checkpoint / _COMMON, None, None)
    if not isinstance(common, dict):
        raise InputError(f"{checkpoint / _COMMON} holds a {type(common).__name__}, not a state")
    return common


def _load_tensors_only(file: Path, offset: int | None, length: int | None) -> Any:
    """Unpickle with torch's restriction to tensors and plain values."""
    try:
        with file.open("rb") as opened:
            opened.seek(offset or 0)
            content = opened.read() if length is None else opened.read(length)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} holds more than tensors and plain values: not a checkpoint that nemo-care "
            f"wrote ({_cause(error)})"
        ) from error
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: {error.strerror}") from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise DamagedCheckpoint(f"{file}: not what torch wrote ({_cause(error)})") from error


# ---------------------------------------------------------------------- loading


def load(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint, as Megatron does; collective over all ranks.

    All unpickling is restricted here: to the names of an index, and to tensors and plain values.
    """
    with _restricted_reading():
        return dist_checkpointing.load(
            state,
            str(checkpoint),
            # Given explicitly, so that `metadata.json` can't choose another format.
            sharded_strategy=mcore_torch.TorchDistLoadShardedStrategy(),
            common_strategy=_CommonStrategy(),
        )


class _CommonStrategy(TorchCommonLoadStrategy):
    """Reads the unsharded state; an environment variable of torch could lift the restriction."""

    def load_common(self, checkpoint_dir: str | Path) -> Any:
        return torch.load(Path(checkpoint_dir) / _COMMON, map_location="cpu", weights_only=True)


class _Reader(FileSystemReader):
    """Reads the index once, with a list of allowed names."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._index = self._index or read_index(Path(self.path))
        return self._index


class _Planner(mcore_torch.MCoreLoadPlanner):
    """Unpickles objects as tensors and plain values."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        loaded = torch.load(value, map_location="cpu", weights_only=True)
        name = read_item.dest_index.fqn
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[name], loaded)
        else:
            self.state_dict[name] = loaded


@contextmanager
def _restricted_reading() -> Iterator[None]:
    """Replace the reader and planner that Megatron's loading creates by these names."""
    reader, planner = mcore_torch._get_filesystem_reader, mcore_torch.MCoreLoadPlanner
    mcore_torch._get_filesystem_reader = lambda folder, cache_metadata=False: _Reader(folder)
    mcore_torch.MCoreLoadPlanner = _Planner
    try:
        yield
    finally:
        mcore_torch._get_filesystem_reader, mcore_torch.MCoreLoadPlanner = reader, planner


def _cause(error: Exception) -> str:
    """Return the line that names what is not allowed, otherwise the first."""
    named = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
    return named[0] if named else first_line(error)
