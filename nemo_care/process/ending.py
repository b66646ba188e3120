"""How a command's process ends: exit statuses, signals, and the end of its parent process.

Quick to import: entry points call `watch` before slow imports.

A thread reads signals from Python's wakeup pipe. They are therefore handled while the main thread
waits in a C library, for example in a collective for a rank that has died.
"""

import atexit
import contextlib
import errno
import io
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from nemo_care.process.environment import STARTER

FAILURE = 1
USAGE_ERROR = 2
# EX_TEMPFAIL of sysexits.h: try again later.
STOPPED = 75

STARTER_GONE = 0  # instead of a signal's number

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""The signals that request a stop: from a scheduler, from Ctrl-C, from a closed terminal."""

_PERIOD = 0.5  # seconds between checks of the starter
# An earlier repetition is the same request: `timeout` signals a process and then its group.
_SAME_REQUEST = 0.2  # seconds

Action = Callable[[int], object]


def status_of(number: int) -> int:
    """Return the exit status after a request: as in shells, 130 for Ctrl-C and 129 for SIGHUP."""
    return 128 + number if number in (signal.SIGINT, signal.SIGHUP) else STOPPED


def cause_of(number: int) -> str:
    """Describe a request."""
    if number == STARTER_GONE:
        return "the process that started this one has ended"
    return f"{signal.Signals(number).name} was received"


class _Watch:
    """The thread that receives requests and acts on them."""

    def __init__(self) -> None:
        self.action: Action = end_at_once
        # Python writes every signal with a handler to the pipe, such as a library's SIGCHLD.
        self.numbers: set[int] = {STARTER_GONE}
        self._interrupted = 0.0
        self._hear, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)

    def start(self) -> None:
        """Act on what has been received, and on what follows."""
        threading.Thread(
            target=self._listen, args=(self._hear, _starter()), daemon=True, name="signals"
        ).start()

    def close(self) -> None:
        """End the thread."""
        signal.set_wakeup_fd(-1)
        os.close(self._tell)

    def _listen(self, hear: int, starter: int | None) -> None:
        while True:
            ready, _, _ = select.select([hear], [], [], None if starter is None else _PERIOD)
            if ready:
                heard = os.read(hear, 64)
                if not heard:
                    os.close(hear)
                    return
                for number in heard:
                    self._act(number)
            if starter is not None and os.getppid() != starter:
                starter = None
                self._act(STARTER_GONE)

    def _act(self, number: int) -> None:
        if number not in self.numbers:
            return
        if number == signal.SIGINT:
            before, self._interrupted = self._interrupted, time.monotonic()
            if before and self._interrupted - before < _SAME_REQUEST:
                return
            if before:
                end_at_once(number)
        self.action(number)


_watch: _Watch | None = None


def watch(*numbers: int) -> None:
    """Act on these signals and on the starter's death from now on, instead of dying of them.

    The process ends at once unless `on_request` or `unwinding` change that. A second Ctrl-C always
    ends it at once. SIGINT and SIGHUP stay ignored if they are, as under nohup. Main thread only.
    """
    global _watch
    is_first = _watch is None
    if _watch is None:
        _watch = _Watch()
    _watch.numbers.update(numbers)
    for number in numbers:
        ignorable = number in (signal.SIGINT, signal.SIGHUP)
        if not ignorable or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _heard)
    if is_first:
        # After the handlers: whoever sees the thread can send these signals.
        _watch.start()


def watch_run() -> None:
    """Do the same as `watch` for commands that run as ranks, which also survive their terminal."""
    _outlive_the_terminal()
    watch(*ASKING)


def on_request(action: Action) -> None:
    """Call `action` with a request's number in the watching thread, if one watches."""
    if _watch is not None:
        _watch.action = action


@contextlib.contextmanager
def starting(action: Action) -> Iterator[None]:
    """Be the starter of the processes started in this block: they end after this process, and
    requests go to `action`. Also works if nothing watches yet; main thread only."""
    global _watch
    handlers = None
    if _watch is None:
        handlers = {number: signal.getsignal(number) for number in ASKING}
        watch(*ASKING)
    assert _watch is not None
    before, _watch.action = _watch.action, action
    os.environ[STARTER.name] = str(os.getpid())
    try:
        yield
    finally:
        del os.environ[STARTER.name]
        _watch.action = before
        if handlers is not None:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            _watch.close()
            _watch = None


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Let a first Ctrl-C raise KeyboardInterrupt in the main thread of the block, as in Python."""
    if _watch is None or signal.getsignal(signal.SIGINT) is not _heard:
        yield
        return
    before = _watch.action

    def leave_to_python(number: int) -> None:
        if number != signal.SIGINT:
            before(number)

    _watch.action = leave_to_python
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        signal.signal(signal.SIGINT, _heard)
        # The watching thread can receive the handled Ctrl-C later.
        if not interrupted:
            _watch.action = before


def end_at_once(number: int) -> NoReturn:
    """End this process and all processes that it has started, whatever its threads do."""
    if is_speaker():
        # Not through sys.stderr, whose lock another thread can hold.
        with contextlib.suppress(OSError):
            os.write(2, f"nemo-care: ended at once: {cause_of(number)}\n".encode())
    _kill_descendants()
    os._exit(status_of(number))


def is_speaker() -> bool:
    """Whether this process prints for the ranks: rank 0, or not a rank."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def leave(status: int) -> NoReturn:
    """End this process with an exit status; if that is not 0, without waiting for threads.

    Threads of a command that did not finish can be waiting for an endpoint. A failed rank leaves
    its process groups open, because the remaining ranks no longer take part in closing them: gloo's
    threads can then abort the interpreter's shutdown, as if the rank had died of a signal.
    """
    if not status:
        sys.exit(0)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _heard(number: int, frame: FrameType | None) -> None:
    """Do nothing; the signal is in the pipe."""


def _starter() -> int | None:
    """Return the parent process to watch; None if this process can outlive its parent."""
    # Removed, because processes started from here may have a different starter.
    given = os.environ.pop(STARTER.name, None)
    if given is not None:
        return int(given)
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def _kill_descendants() -> None:
    try:
        import psutil
    except ImportError:  # `nemo-care doctor` runs without psutil
        return
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


class _Forgiving(io.FileIO):
    """A terminal or pipe whose other end can disappear; later output is dropped."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return len(data)


def _outlive_the_terminal() -> None:
    """Keep a closed terminal from ending a run that is about to save."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        # Not if something else has replaced it.
        if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != number:
            continue
        stream.flush()
        raw = io.BufferedWriter(_Forgiving(number, "w", closefd=False))
        made = io.TextIOWrapper(
            raw,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, made)
