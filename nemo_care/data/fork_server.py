"""The process that decoding processes are forked from.

Light to import: a command that will decode starts the server first, and imports torch and the rest
while the server does the same.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

from nemo_care.process.ending import ASKING

_PRELOADED = [
    "nemo_care.data.decoding",
    "nemo_care.data.video_readers",
    "decord",
    # How a family cuts patches comes with a request.
    "nemo_care.models.families",
]
# Ctrl-C, a closed terminal, Slurm and others send them to a whole process group, and mean the
# training process.
_NOT_FOR_CHILDREN = ASKING


def fork_context() -> ForkServerContext:
    """Where decoding processes come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


@contextmanager
def deaf_children() -> Iterator[None]:
    """What this thread starts meanwhile never hears of the signals that ask a run to stop.

    They live on while the run ends its step, and end with the training process. The thread itself
    gets a signal that arrives meanwhile afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_CHILDREN)
    try:
        resource_tracker.ensure_running()  # would be started with the server, and unblocks signals
        signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_CHILDREN)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_fork_server() -> None:
    """Start the server, without waiting for its imports."""
    fork_context()
    with deaf_children():
        forkserver.ensure_running()
