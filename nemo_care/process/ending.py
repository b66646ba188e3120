"""How a process of a command ends: exit statuses, signals, and the death of the process it serves.

Light to import: an entry calls `watch` before it imports anything that takes long.

Signals are read by a thread from Python's wakeup pipe. So they are heard while the main thread
waits in a C library, such as in a collective for a rank that is gone.
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
# EX_TEMPFAIL of sysexits.h: try the same again later.
STOPPED = 75

STARTER_GONE = 0  # in place of a signal's number

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""The signals that ask a run to stop: of a scheduler, of Ctrl-C, of a closed terminal."""

_PERIOD = 0.5  # seconds between two looks at the starter
# What repeats sooner is the same request: `timeout` signals a process and then its group.
_SAME_REQUEST = 0.2  # seconds

Action = Callable[[int], object]


def status_of(number: int) -> int:
    """The exit status after a request: 130 and 129 for Ctrl-C and SIGHUP as shells have it."""
    return 128 + number if number in (signal.SIGINT, signal.SIGHUP) else STOPPED


def cause_of(number: int) -> str:
    """A request in words."""
    if number == STARTER_GONE:
        return "the process that started this one has ended"
    return f"{signal.Signals(number).name} was received"


class _Watch:
    """The thread that hears requests and acts on them."""

    def __init__(self) -> None:
        self.action: Action = end_at_once
        # Python writes all that has a handler to the pipe, such as a library's SIGCHLD.
        self.numbers: set[int] = {STARTER_GONE}
        self._interrupted = 0.0

    def start(self) -> None:
        """Hear from now on."""
        hear, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        threading.Thread(
            target=self._listen, args=(hear, _starter()), daemon=True, name="signals"
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

    The process ends at once, unless `on_request` or `unwinding` say otherwise. A second Ctrl-C
    always ends it at once. SIGINT and SIGHUP stay ignored where they are, as under nohup. Main
    thread only.
    """
    global _watch
    if _watch is None:
        _watch = _Watch()
        _watch.start()
    _watch.numbers.update(numbers)
    for number in numbers:
        ignorable = number in (signal.SIGINT, signal.SIGHUP)
        if not ignorable or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _heard)


def watch_run() -> None:
    """As `watch`, for the commands that run as ranks; they go on without a terminal too."""
    _outlive_the_terminal()
    watch(*ASKING)


def on_request(action: Action) -> None:
    """Call `action` with a request's number, in the watching thread; nothing where none watches."""
    if _watch is not None:
        _watch.action = action


@contextlib.contextmanager
def starting(action: Action) -> Iterator[None]:
    """Be the starter of what is started meanwhile: it ends after this process, and requests go to
    `action`. Also where nothing watches yet; main thread only."""
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
    """Let a first Ctrl-C raise KeyboardInterrupt in the main thread meanwhile, as Python does."""
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
        # The watching thread may hear of the Ctrl-C that has just been followed only later.
        if not interrupted:
            _watch.action = before


def end_at_once(number: int) -> NoReturn:
    """End this process and all that it has started, whatever its threads do."""
    if is_speaker():
        # Not through sys.stderr, whose lock another thread may hold.
        with contextlib.suppress(OSError):
            os.write(2, f"nemo-care: ended at once: {cause_of(number)}\n".encode())
    _kill_descendants()
    os._exit(status_of(number))


def is_speaker() -> bool:
    """Whether this process speaks for the ranks: a rank 0, or no rank."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def leave(status: int) -> NoReturn:
    """End this process with an exit status; where that is not 0, without waiting for threads.

    Threads of a command that did not get to its end may wait for an endpoint. A rank that has
    failed leaves its process groups open, because the others no longer take part in closing them:
    gloo's threads may abort the interpreter's end then, and it would look as if the rank had died
    of a signal.
    """
    if not status:
        sys.exit(0)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _heard(number: int, frame: FrameType | None) -> None:
    """The pipe has it."""


def _starter() -> int | None:
    """The parent process to watch; None where this one may outlive its parent."""
    # Taken out: what this process starts may serve something else.
    given = os.environ.pop(STARTER.name, None)
    if given is not None:
        return int(given)
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


def _kill_descendants() -> None:
    try:
        import psutil
    except ImportError:  # `nemo-care doctor` runs without
        return
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            process.kill()


class _Forgiving(io.FileIO):
    """A terminal or pipe whose other end may go away: what is written then is dropped."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE):
                raise
            return len(data)


def _outlive_the_terminal() -> None:
    """Let a line on a closed terminal end no run that is about to save."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        # Not where something else stands for it.
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
