"""Start the ranks of a run on this machine, as torchrun does."""

import contextlib
import logging
import os
import signal
import sys
import traceback
import uuid
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record

from nemo_care.errors import InputError, RunStopped

USAGE_ERROR = 2
FAILURE = 1
# EX_TEMPFAIL of sysexits.h: try the same again later.
STOPPED = 75


def start_ranks(count: int, arguments: Sequence[str]) -> int:
    """Run `python ARGUMENTS` as `count` ranks and wait for them.

    When one dies, the others are ended and its rank and traceback are printed. SIGTERM and SIGUSR1
    are passed on to the ranks, which stop after the running step and save.

    Returns:
        The exit status: 0, or that of the first rank that failed.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _pass_on)
    # Its own report of a failed rank repeats what the rank has printed.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        # Without SIGTERM, by which it would kill the ranks in the middle of a step.
        signals_to_handle="SIGINT,SIGHUP,SIGQUIT",
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode in (USAGE_ERROR, STOPPED):
            return failure.exitcode
        # The rank's own traceback is on stderr; here is which rank it was.
        how = (
            f"signal {failure.signal_name()}"
            if failure.exitcode < 0
            else (f"exit status {failure.exitcode}")
        )
        print(f"rank {rank} failed with {how}; the other ranks were stopped", file=sys.stderr)
        return FAILURE
    return 0


def _pass_on(number: int, frame: FrameType | None) -> None:
    for rank in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def guarded(main: Callable[..., Any], *arguments: Any) -> int:
    """Call `main` and turn its end into an exit status: 0, 1 (traceback), 2 or 75 (one line)."""
    try:
        record(main)(*arguments)
    except InputError as error:
        print(f"nemo-care: {error}", file=sys.stderr)
        return USAGE_ERROR
    except RunStopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(f"nemo-care: {stopped}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print("nemo-care: interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return FAILURE
    return 0
