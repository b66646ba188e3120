"""Safetensors files of ours."""

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
    """Write tensors to a file that others may read as any new file."""
    with usual_mode(file):
        save_file(dict(tensors), file, metadata=metadata)


@contextmanager
def usual_mode(file: Path) -> Iterator[None]:
    """Gives `file`, which the block writes, the mode of an ordinary new file.

    safetensors writes to a temporary file, which nobody else may read, and renames it.
    """
    file.touch()
    mode = file.stat().st_mode & 0o777
    yield
    file.chmod(mode)


def load_tensors(file: Path, *, remedy: str) -> dict[str, torch.Tensor]:
    """The tensors of a file.

    Raises:
        InputError: it can't be read, or is cut short or otherwise broken.
    """
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: not a readable safetensors file ({error}); {remedy}") from error
