"""Start the ranks of a run on this machine, as torchrun does; each machine has one starter."""

import contextlib
import logging
import os
import signal
import sys
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, LogsDest
from torch.distributed.elastic.multiprocessing.errors import (
    ChildFailedError,
    ProcessFailure,
    record,
)
from torch.distributed.elastic.rendezvous import RendezvousError

from nemo_care.errors import AlreadyDone, InputError, RunFailed, RunStopped
from nemo_care.process import ending
from nemo_care.process.cores import available_cores
from nemo_care.process.ending import FAILURE, USAGE_ERROR
from nemo_care.process.environment import RANK_LOGS
from nemo_care.process.os_errors import is_unusable_place, os_error_line
from nemo_care.process.screen import one_line, say
from nemo_care.ranks.slurm import Node

_SHOWN_LINES = 40  # of a failed rank's output
_JOIN_SECONDS = 900  # limit for all machines to join; one can be fetching its container


def start_ranks(count: int, arguments: Sequence[str], node: Node | None = None) -> int:
    """Run `python ARGUMENTS` as `count` ranks and wait for them.

    When a rank dies, the remaining ranks are ended, and its number and traceback are printed.
    Requests to stop (`ending.ASKING`) are passed on to the ranks, which stop after the running step
    and save; a second Ctrl-C ends everything at once. Main thread only.

    Args:
        count: number of ranks on this machine.
        arguments: the command line of the ranks.
        node: this machine, if the ranks of several form one world; each machine has a starter.

    Returns:
        The exit status: 0, that of a request to stop, or that of the first rank that failed.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    asked: list[int] = []

    def pass_on(number: int) -> None:
        asked.append(number)
        ranks = psutil.Process().children()
        if not ranks:
            ending.end_at_once(number)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(number if number != ending.STARTER_GONE else signal.SIGTERM)

    # Each rank would otherwise start as many threads as the machine has cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // count)))
    # Elastic's report of a failed rank repeats what the rank has printed.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    here = node or Node(0, 1, "localhost", "localhost", 0, uuid.uuid4().hex)
    folder = RANK_LOGS.value
    config = LaunchConfig(
        min_nodes=here.count,
        max_nodes=here.count,
        nproc_per_node=count,
        run_id=here.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{here.address}:{here.port}",
        # Where the ranks meet if this is the first machine. By default it is the host's full name,
        # which resolves to a loopback address or not at all on some machines.
        local_addr=here.address if here.place == 0 else here.name,
        rdzv_configs={
            "is_host": here.place == 0,
            "join_timeout": _JOIN_SECONDS,
            # The first starter checks the inputs before it listens.
            "read_timeout": _JOIN_SECONDS,
        },
        max_restarts=0,
        monitor_interval=0.2,
        # Without the signals that are passed on: elastic would kill the ranks in mid-step.
        signals_to_handle="SIGQUIT",
        logs_specs=_RankLogs(Path(folder)) if folder else None,
        log_line_prefix_template="rank ${rank}: ",
    )
    try:
        with ending.starting(pass_on):
            elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = _first_failure(error)
        statuses = {failed.exitcode for failed in error.failures.values()}
        for number in asked:
            # A rank that was still starting Python dies of the signal itself.
            if ending.status_of(number) in statuses or failure.exitcode == -number:
                return ending.status_of(number)
        if failure.exitcode == ending.STOPPED:
            return ending.STOPPED
        if folder and rank != 0:
            _show_end(_log_file(Path(folder), rank, "err"))
        if failure.exitcode == USAGE_ERROR:
            return USAGE_ERROR
        # The rank's own traceback is on stderr; this line adds its number.
        killed = failure.exitcode < 0
        how = f"signal {failure.signal_name()}" if killed else f"exit status {failure.exitcode}"
        where = f" on {node.name}" if node is not None else ""
        say(f"rank {rank}{where} failed with {how}; the other ranks were stopped", file=sys.stderr)
        return FAILURE
    except RendezvousError as error:
        say(
            f"{here.name}: the starters of {here.count} machines did not meet at "
            f"{here.address}:{here.port}, or the first of them has exited ({error})",
            file=sys.stderr,
        )
        return FAILURE
    return 0


def _first_failure(error: ChildFailedError) -> tuple[int, ProcessFailure]:
    """Return the rank that failed first.

    Times have a resolution of one second, and when a rank is killed the rest fails at once: a
    killed rank takes precedence. SIGTERM comes from the starter, which sends it to the remaining
    ranks.
    """
    first = error.get_first_failure()
    for rank, failure in error.failures.items():
        is_killed = failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM
        if is_killed and failure.timestamp <= first[1].timestamp + 1:
            return rank, failure
    return first


class _RankLogs(DefaultLogsSpecs):
    """Logs output and errors of each rank to two files, and those of rank 0 to the screen."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return the destinations of the output of this machine's ranks."""
        destination = super().reify(envs)
        for place, env in envs.items():
            rank = int(env["RANK"])
            destination.stdouts[place] = str(_log_file(self._folder, rank, "out"))
            destination.stderrs[place] = str(_log_file(self._folder, rank, "err"))
            if rank == 0:
                destination.tee_stdouts[place] = destination.stdouts[place]
                destination.tee_stderrs[place] = destination.stderrs[place]
        return destination


def _log_file(folder: Path, rank: int, kind: str) -> Path:
    return folder / f"rank_{rank:04d}.{kind}"


def _show_end(file: Path) -> None:
    with file.open(errors="replace") as lines:
        say("".join(deque(lines, maxlen=_SHOWN_LINES)), file=sys.stderr, end="")
    say(f"({file})", file=sys.stderr)


def guarded(main: Callable[..., Any], *arguments: Any, unwinds: bool = True) -> int:
    """Call `main` and turn its end into an exit status: 0, 1, or 2 and 75 (one line each).

    `unwinds`: Ctrl-C raises KeyboardInterrupt; otherwise requests are handled by `ending.watch`.
    """
    try:
        with ending.unwinding() if unwinds else contextlib.nullcontext():
            record(main)(*arguments)
    except InputError as error:
        say(f"nemo-care: {one_line(error)}", file=sys.stderr)
        return USAGE_ERROR
    except AlreadyDone as done:
        if ending.is_speaker():
            say(f"nemo-care: {done}")
    except RunStopped as stopped:
        # Slurm and torch end the rest of a job as soon as one rank has exited.
        ending.on_request(lambda number: None)
        if ending.is_speaker():
            say(f"nemo-care: {stopped}", file=sys.stderr)
        return stopped.status
    except RunFailed as error:
        say(f"nemo-care: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        say("nemo-care: interrupted", file=sys.stderr)
        return ending.status_of(signal.SIGINT)
    except OSError as error:
        return _of_system(error)
    except Exception:
        say(traceback.format_exc(), file=sys.stderr, end="")
        return FAILURE
    return _with_output_written()


def _of_system(error: OSError) -> int:
    """Report an operating system error and return its exit status."""
    if error.filename is None and _with_output_written():
        return FAILURE  # the output failed: a full disk, or a reader such as head has exited
    line = os_error_line(error)
    if line is None:
        say("".join(traceback.format_exception(error)), file=sys.stderr, end="")
        return FAILURE
    say(f"nemo-care: {one_line(line)}", file=sys.stderr)
    return USAGE_ERROR if is_unusable_place(error) else FAILURE


def _with_output_written() -> int:
    """Flush the output of a completed command, which can fail, and return the exit status."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Otherwise the interpreter tries again at exit, and prints a traceback.
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            say(f"nemo-care: the output can't be written: {error.strerror}", file=sys.stderr)
        return FAILURE
    return 0
