"""The server process that decoding processes are forked from.

It is light to import: a command that will decode starts the server first, and the server imports
torch and other modules while the command does the same.
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
    # A request contains the family's rule for cutting patches.
    "nemo_care.models.families",
]


def fork_context() -> ForkServerContext:
    """Return the context that starts decoding processes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


@contextmanager
def deaf_children() -> Iterator[None]:
    """Block the signals that stop a run in the processes that this thread starts inside.

    Ctrl-C, a closed terminal, Slurm and others send them to a whole process group, but they are
    meant for the training process. Its children continue while the run completes its step, and end
    with it. The thread itself receives a signal that arrives inside afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        resource_tracker.ensure_running()  # would be started with the server, and unblocks signals
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_fork_server() -> None:
    """Start the server, without waiting for its imports."""
    fork_context()
    with deaf_children():
        forkserver.ensure_running()
