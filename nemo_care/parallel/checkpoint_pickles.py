"""Refuse checkpoints whose pickles would run code.

torch's distributed checkpoints have an index, `.metadata`, that `pickle.load` reads, and hold
objects that torch loads without restriction. A pickle may call anything that Python can import, so
all of them are read here first, with nothing allowed but what a checkpoint consists of.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from nemo_care.errors import DamagedCheckpoint, InputError

_INDEX = ".metadata"
_COMMON = "common.pt"
_METADATA = "torch.distributed.checkpoint.metadata"
# What the index of a checkpoint names, found in those that are written; torch's dtypes besides.
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
    """A name that no checkpoint of ours holds."""


class _IndexReader(pickle.Unpickler):
    """Reads an index, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        raise _Foreign(f"{module}.{name}")


def read_index(checkpoint: Path) -> Metadata:
    """The index of a checkpoint, read without running anything that it may hold.

    Raises:
        InputError: the file holds what no checkpoint of nemo-care does; DamagedCheckpoint where it
            can't be read at all.
    """
    file = checkpoint / _INDEX
    try:
        with file.open("rb") as opened:
            index = _IndexReader(opened).load()
    except _Foreign as error:
        raise InputError(f"{file} names {error}: not a checkpoint that nemo-care wrote") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: {error.strerror}") from error
    # Torn bytes raise whatever the pickle's virtual machine stumbles over.
    except Exception as error:
        raise DamagedCheckpoint(f"{file}: not the index of a checkpoint ({error})") from error
    if not isinstance(index, Metadata):
        raise InputError(f"{file} holds a {type(index).__name__}, not a checkpoint's index")
    return index


def check_pickles(checkpoint: Path) -> Metadata:
    """Refuse a checkpoint that would run code when it is loaded; its index otherwise.

    Raises:
        InputError: names the file and what it holds (see `read_index`).
    """
    index = read_index(checkpoint)
    read_common(checkpoint)
    for place, storage in (index.storage_data or {}).items():
        if not isinstance(index.state_dict_metadata.get(place.fqn), BytesStorageMetadata):
            continue
        file = checkpoint / storage.relative_path
        if file.parent != checkpoint:
            raise InputError(f"{checkpoint / _INDEX} points to {file}, outside the checkpoint")
        _load_tensors_only(file, storage.offset, storage.length)
    return index


def read_common(checkpoint: Path) -> dict[str, Any]:
    """The part of a checkpoint's state that is no tensor, read without running anything.

    Raises:
        InputError: see `check_pickles`.
    """
    common = _load_tensors_only(checkpoint / _COMMON, None, None)
    if not isinstance(common, dict):
        raise InputError(f"{checkpoint / _COMMON} holds a {type(common).__name__}, not a state")
    return common


def _load_tensors_only(file: Path, offset: int | None, length: int | None) -> Any:
    """Load a pickle the way that allows tensors and plain values only."""
    try:
        with file.open("rb") as opened:
            opened.seek(offset or 0)
            content = opened.read() if length is None else opened.read(length)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{file} holds more than tensors and plain values: not a checkpoint that nemo-care "
            f"wrote ({_first_line(error)})"
        ) from error
    except OSError as error:
        raise DamagedCheckpoint(f"{file}: {error.strerror}") from error
    except (RuntimeError, EOFError, ValueError) as error:
        raise DamagedCheckpoint(f"{file}: not what torch wrote ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    unsupported = [line for line in lines if "GLOBAL" in line]
    return (unsupported or lines)[0].strip()
