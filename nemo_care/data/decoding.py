"""Processes that decode while the model computes, and what happens when one hangs or dies.

Each process has a pipe and a thread of its own. So one that is killed, because a file makes ffmpeg
loop or crash, takes nothing along but its own sample, and the next sample gets a new process. (In
the usual pools the processes share one pipe, which a killed one may leave locked or half written.)

The processes come from Python's fork server: started once, it imports what decoding needs, and
knows nothing of the GPU, the process groups and the threads of the training process.
"""

import contextlib
import multiprocessing
import os
import queue
import resource
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection

import psutil
import torch

from nemo_care.data.fork_server import deaf_children, fork_context
from nemo_care.data.media import Media, MediaRequest, load_media
from nemo_care.data.media_errors import (
    FatalMedia,
    SlowMedia,
    UnreadableMedia,
    library_reason,
    one_line,
)
from nemo_care.errors import InputError
from nemo_care.recipe.data import DataConfig

Load = Callable[[MediaRequest], Media]

_GIB = 2**30
# For a fork server that has to import torch and transformers on a busy machine.
_START_SECONDS = 300.0


class DecodingWorkers:
    """Decodes media in `count` processes; with none, in the calling thread and without bounds."""

    def __init__(
        self, count: int, *, seconds: float, memory_gib: float, load: Load = load_media
    ) -> None:
        """Start the processes, without waiting for them.

        Args:
            count: of processes.
            seconds: that one request may take before its process is killed.
            memory_gib: that one process may use.
            load: what the processes do; importable by name.
        """
        self.count = count
        self.load = load
        self._processes: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all: list[_Process] = []
        self._threads = ThreadPoolExecutor(count, "decoding") if count else None
        for _ in range(count):
            process = _Process(load, seconds, memory_gib)
            self._all.append(process)
            self._processes.put(process)
        for _ in range(count):
            self._submit(_Process.ensure_started)

    @classmethod
    def of(cls, config: DataConfig, *, leads: bool) -> "DecodingWorkers":
        """As the recipe says; none where this rank does not lead its model replica."""
        return cls(
            config.workers if leads else 0,
            seconds=config.seconds_per_sample,
            memory_gib=config.worker_memory_gib,
        )

    @property
    def peak_memory_gib(self) -> float | None:
        """Most memory that one of the processes has used so far; None without processes."""
        return max((process.peak_memory for process in self._all), default=0) / _GIB or None

    def submit(self, request: MediaRequest) -> Future[Media]:
        """The media of a request, or an InputError that says why they can't be used."""
        if not request.videos and not request.images:
            return _done(Media())
        if self._threads is None:
            return _done(_attempt(self.load, request))
        return self._submit(lambda process: process.run(request))

    def _submit(self, work: "Callable[[_Process], Media | None]") -> Future:
        def with_a_process() -> Media | None:
            process = self._processes.get()
            try:
                return work(process)
            finally:
                self._processes.put(process)

        assert self._threads is not None
        return self._threads.submit(with_a_process)

    def close(self) -> None:
        """Stop the processes; what was submitted and is not done fails."""
        if self._threads is None:
            return
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._all:
            process.close()
        self._threads.shutdown()


class _Process:
    """One decoding process, as its thread sees it; started anew when it is gone."""

    def __init__(self, load: Load, seconds: float, memory_gib: float) -> None:
        self.seconds = seconds
        self.memory = int(memory_gib * _GIB)
        self.peak_memory = 0
        self._load = load
        self._connection: Connection | None = None
        self._process: multiprocessing.process.BaseProcess | None = None
        self._closed = False
        # Against a process that starts while `close` looks for it.
        self._lock = threading.Lock()

    def ensure_started(self) -> None:
        """Start the process and wait until it is ready.

        Raises:
            RuntimeError: it does not start.
        """
        if self._connection is not None:
            return
        context = fork_context()
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, self._load, self.memory), daemon=True, name="decoding"
        )
        with self._lock:
            if self._closed:
                raise RuntimeError("the decoding processes have been closed")
            with deaf_children():
                process.start()
            self._connection, self._process = ours, process
        # Ours has to be the only other end, or the death of the process would go unnoticed.
        theirs.close()
        try:
            started = self._receive(_START_SECONDS) is not None
        except TimeoutError:
            started = False
        if not started:
            code = self._kill()
            how = f"within {_START_SECONDS:g} seconds" if code is None else f"(exit code {code})"
            raise RuntimeError(
                f"a decoding process did not start {how}: see its message above; "
                "data.worker_memory_gib may be too small, and data.workers=0 does without"
            )

    def run(self, request: MediaRequest) -> Media:
        """The media of a request.

        Raises:
            SlowMedia: the process hung over them.
            FatalMedia: the process died over them.
            InputError: they can't be used for another reason.
        """
        outcome = None
        # Another process of the machine may be to blame for one death, but hardly for two.
        for _ in range(2):
            self.ensure_started()
            assert self._connection is not None
            try:
                self._connection.send(request)
                outcome = self._receive(self.seconds)
            except TimeoutError:
                self._kill()
                raise SlowMedia(
                    f"{_names(request)}: not decoded after data.seconds_per_sample="
                    f"{self.seconds:g} seconds; replace the file, or raise the key if the disk is "
                    "slow"
                ) from None
            except OSError:  # it was killed between two requests
                outcome = None
            if outcome is not None:
                break
            code = self._kill()
        if outcome is None:
            raise FatalMedia(
                f"{_names(request)}: the decoding process died over it (exit code {code}); replace "
                "the file, or raise data.worker_memory_gib if it is only large"
            )
        result, grown, peak = outcome
        self.peak_memory = max(self.peak_memory, peak)
        if grown > self.memory / 2:
            # What leaks must not be charged to a later sample.
            self._kill()
        if isinstance(result, InputError):
            raise result
        return result

    def _receive(self, seconds: float) -> tuple[Media | InputError, int, int] | None:
        """The next message; None when the process has died. Raises TimeoutError."""
        assert self._connection is not None
        try:
            if not self._connection.poll(seconds):
                raise TimeoutError
            return self._connection.recv()
        except (EOFError, ConnectionError):
            return None

    def _kill(self) -> int | None:
        """Kill the process; its exit code, if it had died by itself."""
        with self._lock:
            if self._process is None or self._connection is None:
                return None
            self._process.join(0.1)
            code = self._process.exitcode
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = self._connection = None
            return code

    def close(self) -> None:
        """Kill the process; its thread finds the pipe closed."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()


def _serve(connection: Connection, load: Load, memory: int) -> None:
    """The decoding process: answers requests until the pipe is closed."""
    threading.Thread(target=_end_with_the_training_process, daemon=True).start()
    _limit_memory(memory)
    torch.set_num_threads(1)
    process = psutil.Process()
    begun = process.memory_info().rss
    connection.send("ready")
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            request = connection.recv()
            result = _attempt(load, request)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            connection.send((result, process.memory_info().rss - begun, peak))


def _attempt(load: Load, request: MediaRequest) -> Media | InputError:
    """What a request gives. Whatever a file makes a library raise is that sample's fault alone."""
    try:
        return load(request)
    except InputError as error:
        return error
    except Exception as error:
        return UnreadableMedia(
            f"{_names(request)}: not decoded ({type(error).__name__}: {library_reason(error)}); "
            "replace the file"
        )


def _names(request: MediaRequest) -> str:
    return ", ".join(one_line(str(path)) for path in (*request.videos, *request.images))


def _done(result: Media | InputError) -> Future[Media]:
    future: Future[Media] = Future()
    if isinstance(result, InputError):
        future.set_exception(result)
    else:
        future.set_result(result)
    return future


def _end_with_the_training_process() -> None:
    """Watch for the end of the process that is to be served, which a hung decoder would miss."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _limit_memory(more: int) -> None:
    """Let the process allocate `more` bytes than it has now."""
    if sys.platform == "linux":
        with open("/proc/self/status") as status:
            now = next(int(line.split()[1]) for line in status if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (now * 1024 + more,) * 2)
