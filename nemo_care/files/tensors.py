"""Safetensors files."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nemo_care.errors import InputError


def save_tensors(
    file: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a file with the usual permissions of a new file."""
    with usual_mode(file):
        save_file(dict(tensors), file, metadata=metadata)


@contextmanager
def usual_mode(file: Path) -> Iterator[None]:
    """Give `file`, which the block writes, the mode of an ordinary new file.

    safetensors writes a temporary file that only its owner can read, and renames it.
    """
    file.touch()
    mode = file.stat().st_mode & 0o777
    yield
    file.chmod(mode)


def load_tensors(file: Path, *, remedy: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a file.

    Raises:
        InputError: it can't be read, or is cut short or otherwise damaged.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error}); {remedy}") from error
