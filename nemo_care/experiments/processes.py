"""Run training commands, a limited number at a time, and leave no process running."""

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_care.process.cores import available_cores
from nemo_care.process.environment import STARTER

# Seconds that a child has to exit by itself (it can be saving a checkpoint) before it is killed.
_GRACE = 20.0
_LOG_TAIL_BYTES = 16384


@dataclass(frozen=True)
class Job:
    """A command and the file for its output."""

    name: str
    command: Sequence[str]
    log: Path


@dataclass(frozen=True)
class Failure:
    """A job that failed."""

    name: str
    status: int
    """Exit status; negative: the signal that ended it."""
    log: Path
    last_lines: list[str]


def last_lines(log: Path, count: int = 15) -> list[str]:
    """Return the last non-empty lines of a log; of a progress bar only its last state."""
    if not log.exists():
        return []
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _LOG_TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in re.split(r"\r?\n", text)]
    return [line for line in lines if line.strip()][-count:]


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Make SIGTERM and a closed terminal end Python in order, so that children end too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: Any) -> None:
        raise SystemExit(128 + number)

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it is
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_group(child: subprocess.Popen[bytes], number: int) -> None:
    # The child leads its own process group, which includes the ranks that it starts.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _end(children: Sequence[subprocess.Popen[bytes]], grace: float) -> None:
    """End the children and all processes that they started."""
    for child in children:
        _signal_group(child, signal.SIGTERM)
    until = time.monotonic() + grace
    try:
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, until - time.monotonic()))
    finally:
        # Also if the child itself has exited, since its ranks may still run; at once on a
        # second Ctrl-C.
        for child in children:
            _signal_group(child, signal.SIGKILL)
            child.wait()


def _start(job: Job, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("wb") as log:
        return subprocess.Popen(
            list(job.command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def run_jobs(
    jobs: Sequence[Job],
    at_once: int,
    *,
    tick: Callable[[list[str]], None],
    done: Callable[[Job, Failure | None], None],
    grace: float = _GRACE,
) -> None:
    """Run all jobs, at most `at_once` at a time; a failing job does not stop the rest.

    `tick` receives the names of the running jobs about once a second, `done` each job that ended.
    On Ctrl-C, SIGTERM or any error the running jobs are ended (killed after `grace` seconds). They
    also end by themselves if this process is killed.
    The output of a job replaces its log.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, available_cores() // at_once)),
        STARTER.name: str(os.getpid()),
    }
    waiting = list(jobs)
    running: list[tuple[Job, subprocess.Popen[bytes]]] = []
    next_tick = 0.0
    with _ended_by_signals():
        try:
            while waiting or running:
                while waiting and len(running) < at_once:
                    running.append((waiting[0], _start(waiting.pop(0), environment)))
                for job, child in [one for one in running if one[1].poll() is not None]:
                    running.remove((job, child))
                    failure = None
                    if child.returncode:
                        failure = Failure(job.name, child.returncode, job.log, last_lines(job.log))
                    done(job, failure)
                if time.monotonic() >= next_tick:
                    tick([job.name for job, _ in running])
                    next_tick = time.monotonic() + 1.0
                time.sleep(0.1 if running else 0.0)
        finally:
            _end([child for _, child in running], grace)
