"""The process that decoding processes are forked from.

Light to import: a command that will decode starts the server first, and imports torch and the rest
while the server does the same.
"""

import multiprocessing
import signal
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

_PRELOADED = ["nemo_care.data.decoding", "decord"]


def fork_context() -> ForkServerContext:
    """Where decoding processes come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def start_fork_server() -> None:
    """Start the server, without waiting for its imports; for the main thread."""
    fork_context()
    # Until its imports are done it would meet Ctrl-C with a traceback.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)
