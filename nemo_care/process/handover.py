"""Large pickles: the samples of a data set, of which there are hundreds of thousands."""

import gc
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def without_collecting() -> Iterator[None]:
    """Pause Python's search for reference cycles.

    It would go through all objects again and again while they are made, and takes most of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def hand_over(value: Any, file: Path) -> None:
    """Write a value for another process of this user, into a folder that is this user's alone."""
    with file.open("wb") as opened:
        pickle.dump(value, opened, protocol=pickle.HIGHEST_PROTOCOL)


def take_over(file: Path) -> Any:
    """Read what `hand_over` wrote, and remove it; None where there is no such file."""
    try:
        with file.open("rb") as opened, without_collecting():
            value = pickle.load(opened)
    except FileNotFoundError:
        return None
    file.unlink()
    return value
