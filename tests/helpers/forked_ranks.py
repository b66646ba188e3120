"""Ranks that a server forks (see rank_server.py), so that no test waits for imports.

They are processes of their own and meet as those of torchrun do.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PATIENCE = 300.0  # seconds; what takes longer on a busy machine hangs


class RankServer:
    """The process that forks the ranks."""

    def __init__(self, folder: Path) -> None:
        """`folder` holds the ranks' output."""
        self._folder = folder
        self._started = 0
        # What has computed with several threads can't be forked.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        paths = [*sys.path, str(Path(__file__).parent), str(Path(__file__).parents[1] / "faults")]
        environment["PYTHONPATH"] = os.pathsep.join(str(Path(p).resolve()) for p in paths if p)
        self._errors = folder / "server.err"
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rank_server.py"))],
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
        self, count: int, arguments: Sequence[str], fault: dict[str, Any] | None = None
    ) -> "ForkedRanks":
        """Start `python ARGUMENTS` as `count` ranks; the one that `fault` names gets it."""
        self._started += 1
        logs = [self._folder / f"{self._started}_rank_{rank}.log" for rank in range(count)]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        pids = [
            self._ask(
                {
                    "arguments": [str(argument) for argument in arguments],
                    "environment": {
                        **meeting,
                        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
                    },
                    "log": str(log),
                    "fault": fault,
                }
            )
            for rank, log in enumerate(logs)
        ]
        return ForkedRanks(self, pids, logs)

    def run(self, count: int, arguments: Sequence[str]) -> None:
        """Start `python ARGUMENTS` as `count` ranks, which have to end well."""
        ranks = self.start(count, arguments)
        statuses = ranks.wait()
        assert set(statuses) == {0}, f"exit statuses {statuses}\n{ranks.output()}"

    def wait(self, pid: int, seconds: float) -> int | None:
        """A rank's exit status; None when it still runs after that time."""
        return self._ask({"wait": pid, "seconds": seconds})

    def close(self) -> None:
        """End the server and all ranks."""
        self._questions.close()
        self._process.wait()


class ForkedRanks:
    """The ranks of one start."""

    def __init__(self, server: RankServer, pids: Sequence[int], logs: Sequence[Path]) -> None:
        self.pids = pids
        self._server = server
        self._logs = logs

    def wait(self, patience: float = PATIENCE) -> list[int]:
        """Exit status of each rank; that of a signal is its negative number."""
        statuses = [self._server.wait(pid, patience) for pid in self.pids]
        for pid, status in zip(self.pids, statuses, strict=True):
            if status is None:
                os.kill(pid, 9)
        assert None not in statuses, f"a rank hangs\n{self.output()}"
        return statuses  # type: ignore[return-value]

    def output(self) -> str:
        """What the ranks printed."""
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')}" for log in self._logs)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
