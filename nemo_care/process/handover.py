"""Large pickles, for the hundreds of thousands of samples of a data set."""

import gc
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def without_collecting() -> Iterator[None]:
    """Pause Python's search for reference cycles.

    While objects are created it would visit all of them repeatedly, which takes most of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def hand_over(value: Any, file: Path) -> None:
    """Write a value for another process of this user, into a folder private to this user."""
    with file.open("wb") as opened:
        pickle.dump(value, opened, protocol=pickle.HIGHEST_PROTOCOL)


def take_over(file: Path) -> Any:
    """Read and remove what `hand_over` wrote; None if the file does not exist."""
    try:
        with file.open("rb") as opened, without_collecting():
            value = pickle.load(opened)
    except FileNotFoundError:
        return None
    file.unlink()
    return value
