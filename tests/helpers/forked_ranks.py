"""Ranks forked by a server (see rank_server.py), so that no test waits for imports.

They are separate processes, which connect as those of torchrun do.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds; a test that takes longer hangs, even on a busy machine


class RankServer:
    """The process that forks the ranks."""

    def __init__(self, folder: Path, *first: str) -> None:
        """Keep the ranks' output in `folder`; first call `install` of the modules `first`."""
        self._folder = folder
        self._started = 0
        # A process that has computed with several threads can't be forked.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        paths = [*sys.path, str(Path(__file__).parents[1] / "faults")]
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(p).resolve()) for p in paths if p)
        self._errors = folder / "server.err"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rank_server.py")), *first],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout
        assert self._answers.readline() == "ready\n"

    def _ask(self, question: dict[str, Any]) -> Any:
        try:
            self._questions.write(json.dumps(question) + "\n")
            self._questions.flush()
            answer = self._answers.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise RuntimeError(
                f"the rank server is gone (status {self._process.wait()}): "
                f"{self._errors.read_text(errors='replace')}"
            )
        return json.loads(answer)

    def start(
        self,
        count: int,
        arguments: Sequence[str],
        fault: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
    ) -> "ForkedRanks":
        """Start `python ARGUMENTS` as `count` ranks; `fault` is injected into the rank it names."""
        self._started += 1
        logs = [self._folder / f"{self._started}_rank_{rank}.log" for rank in range(count)]
        for log in logs:
            log.touch()  # a test may read it before the rank writes
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        pids = [
            self._fork(
                arguments,
                **{"out": log, "errors": log, "folder": Path.cwd(), "fault": fault},
                environment={
                    **(environment or {}),
                    **meeting,
                    **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
                },
            )
            for rank, log in enumerate(logs)
        ]
        return ForkedRanks(self, pids, logs)

    def run(
        self, arguments: Sequence[object], folder: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENTS` in a folder, as a process without ranks: see subprocess.run."""
        return self.begin(arguments, folder).wait()

    def begin(
        self,
        arguments: Sequence[object],
        folder: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> "ForkedProgram":
        """Start `python ARGUMENTS` in a folder, as a process without ranks."""
        self._started += 1
        out, errors = (self._folder / f"{self._started}.{kind}" for kind in ("out", "err"))
        for file in (out, errors):
            file.touch()  # a test may read it before the program writes
        places = {"out": out, "errors": errors, "folder": folder or Path.cwd()}
        pid = self._fork(arguments, **places, environment=environment or {})
        return ForkedProgram(self, pid, arguments, out, errors)

    def _fork(self, arguments: Sequence[object], **job: Any) -> int:
        places = {key: str(job[key]) for key in ("out", "errors", "folder")}
        job = {"fault": None, **job, **places, "arguments": [str(part) for part in arguments]}
        return self._ask(job)

    def wait(self, pid: int, seconds: float) -> int | None:
        """Return a rank's exit status, or None if it still runs after that time."""
        return self._ask({"wait": pid, "seconds": seconds})

    def close(self) -> None:
        """End the server and all ranks."""
        self._questions.close()
        self._process.wait()


@dataclass
class ForkedProgram:
    """A process, and the files of its output."""

    server: RankServer
    pid: int
    arguments: Sequence[object]
    out: Path
    errors: Path

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Wait until it has ended."""
        status = self.server.wait(self.pid, PATIENCE)
        if status is None:
            os.kill(self.pid, signal.SIGKILL)
        written = [file.read_text(errors="replace") for file in (self.out, self.errors)]
        assert status is not None, f"{self.arguments} hangs\n{''.join(written)}"
        return subprocess.CompletedProcess([*self.arguments], status, *written)


class ForkedRanks:
    """The ranks of one start."""

    def __init__(self, server: RankServer, pids: Sequence[int], logs: Sequence[Path]) -> None:
        self.pids = pids
        self._server = server
        self._logs = logs

    def wait(self, patience: float = PATIENCE) -> list[int]:
        """Return the exit status of each rank; that of a signal is its negative number."""
        statuses = [self._server.wait(pid, patience) for pid in self.pids]
        for pid, status in zip(self.pids, statuses, strict=True):
            if status is None:
                os.kill(pid, signal.SIGKILL)
        assert None not in statuses, f"a rank hangs\n{self.output()}"
        return statuses  # type: ignore[return-value]

    def succeed(self) -> None:
        """Wait until all ranks have succeeded; end all after a failure or a timeout.

        Raises:
            AssertionError: with exit statuses and output.
        """
        until = time.monotonic() + PATIENCE
        statuses: list[int | None] = [None] * len(self.pids)
        while None in statuses and time.monotonic() < until:
            for rank, pid in enumerate(self.pids):
                if statuses[rank] is None:
                    statuses[rank] = self._server.wait(pid, 0.05)
            if any(statuses):
                # The other ranks get some time to report the failure.
                until = min(until, time.monotonic() + 5)
        for pid, status in zip(self.pids, statuses, strict=True):
            if status is None:
                os.kill(pid, signal.SIGKILL)
        assert set(statuses) == {0}, f"exit statuses (None: hangs) {statuses}\n{self.output()}"

    def text(self, rank: int) -> str:
        """Return what a rank has written so far."""
        return self._logs[rank].read_text(errors="replace")

    def output(self) -> str:
        """Return the ranks' output."""
        return "\n".join(f"--- {log.name}\n{self.text(i)}" for i, log in enumerate(self._logs))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
