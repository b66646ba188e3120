"""Requests to stop: a signal from Slurm or a user, or the end of a run's time limit.

A request is only recorded. The ranks compare their records between two steps, so that all stop
after the same step, whichever rank received it.
"""

import signal
import sys
import threading
import time

import torch
import torch.distributed as dist

from nemo_care.errors import RunStopped
from nemo_care.process import ending
from nemo_care.process.ending import (
    STARTER_GONE,
    STOPPED,
    cause_of,
    end_at_once,
    is_speaker,
    status_of,
)
from nemo_care.process.screen import say

# A rank whose starter has died ends after this time if its step does not, like torchrun's ranks
# after a SIGTERM.
_ORPHAN_SECONDS = 30.0

_TIME_IS_UP = -1  # not the number of a request
# If there are several, later ones take precedence.
_REQUESTS = (None, _TIME_IS_UP, STARTER_GONE, *ending.ASKING)


class StopRequest:
    """Records the requests that reach this process."""

    def __init__(self, seconds: float | None = None) -> None:
        """Start the time limit: after `seconds` the run stops by itself; None: never."""
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._noted = 0  # an index into _REQUESTS

    def catch_signals(self) -> None:
        """Record requests from now on, instead of ending, if this process watches for them."""
        ending.on_request(self.note)

    def note(self, number: int) -> None:
        """Request a stop: a signal's number, or STARTER_GONE; called by any thread."""
        self._noted = max(self._noted, _REQUESTS.index(number))
        if number == STARTER_GONE:
            # A step that is stuck, in a collective without its peers, would stay an orphan forever.
            timer = threading.Timer(_ORPHAN_SECONDS, end_at_once, (number,))
            timer.daemon = True
            timer.start()
        if number == signal.SIGINT and is_speaker():
            say(
                "nemo-care: stopping after the running step, with a checkpoint; another Ctrl-C "
                "ends the run at once",
                file=sys.stderr,
            )

    def agreed(self) -> int | None:
        """Return the request that all ranks agree on now, or None; collective over all ranks."""
        noted = self._noted
        if not noted and self._deadline is not None and time.monotonic() > self._deadline:
            noted = _REQUESTS.index(_TIME_IS_UP)
        note = torch.tensor(noted)
        dist.all_reduce(note, op=dist.ReduceOp.MAX)
        return _REQUESTS[int(note)]


def cause_and_status(request: int) -> tuple[str, int]:
    """Describe an agreed request, and return the exit status after it."""
    if request == _TIME_IS_UP:
        return "trainer.max_time_per_run is over", STOPPED
    return cause_of(request), status_of(request)


def stopped(step: int, cause: str, status: int = STOPPED) -> RunStopped:
    """Return the exception for a run that stops after a step and can be resumed."""
    return RunStopped(
        f"stopped after step {step} because {cause}; the same command resumes the run", status
    )
