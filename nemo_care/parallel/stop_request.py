"""Being asked to stop: a signal from Slurm or a user, or the end of the time that a run may take.

Signals only leave a note. The ranks compare their notes between two steps, so that all of them stop
after the same one, whichever was told.
"""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_TIME_IS_UP = 1  # no number of a signal that is caught here


class StopRequest:
    """Notes the requests that reach this process."""

    def __init__(self, seconds: float | None = None) -> None:
        """`seconds` from now the run stops by itself; None: never."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._noted = 0

    def catch_signals(self) -> None:
        """Note SIGTERM and SIGUSR1 from now on instead of dying of them; main thread only."""
        for number in _SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number

    def agreed(self) -> str | None:
        """Why to stop now, on all ranks alike, or None; collective over all ranks."""
        noted = self._noted
        if not noted and self._deadline is not None and time.monotonic() > self._deadline:
            noted = _TIME_IS_UP
        note = torch.tensor(noted)
        dist.all_reduce(note, op=dist.ReduceOp.MAX)
        if not note:
            return None
        number = int(note)
        return (
            "trainer.max_time_per_run is over"
            if number == _TIME_IS_UP
            else (f"{signal.Signals(number).name} was received")
        )
