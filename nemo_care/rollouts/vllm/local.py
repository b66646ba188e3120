"""Engines on this machine: each a process of its own, which the rank that owns it starts."""

import contextlib
import os
import pickle
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from nemo_care.errors import RunFailed
from nemo_care.process.cores import unbound
from nemo_care.process.environment import RESOLVED_RECIPE
from nemo_care.rollouts.vllm.host import EngineManager
from nemo_care.rollouts.vllm.messages import EngineSettings

_SHOWN_LINES = 15
_PAUSE = 0.1
_PATIENCE = 30.0

_PROGRAM = [sys.executable, "-m", "nemo_care.rollouts.vllm.host"]
# vLLM reads the same names, but must not use the addresses and settings of ranks.
_RANK_VARIABLES = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "GROUP_WORLD_SIZE",
        "ROLE_RANK",
        "ROLE_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_USE_AGENT_STORE",
        RESOLVED_RECIPE.name,
    }
)


class HostProcess:
    """The process of an engine that this process owns; it can be started several times.

    Its socket is in a folder that only this user can read; `key` is proved to it in addition.
    """

    def __init__(self, settings: EngineSettings, log: Path, gpus: Sequence[str] | None) -> None:
        """Prepare it, with output to `log`; `gpus` as in CUDA_VISIBLE_DEVICES, None on CPUs."""
        # Not in the run directory, because a socket's path is limited to some hundred characters.
        self._folder = tempfile.TemporaryDirectory(prefix="nemo-care-")
        self.address = str(Path(self._folder.name) / "engine")
        self.key = secrets.token_bytes(32)
        self.settings = settings
        self.log = log
        self.gpus = gpus
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the process, which then loads the model."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        env = {k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES}
        if self.gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        # A killed one has left it behind.
        Path(self.address).unlink(missing_ok=True)
        # Output of earlier starts stays.
        mode = "w" if self.process is None else "a"
        # An engine can have GPUs of several NUMA nodes.
        with self.log.open(mode) as output, unbound():
            self.process = subprocess.Popen(
                [*_PROGRAM, self.address],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                # Signals for the trainer, such as a terminal's Ctrl-C, must only reach the trainer.
                start_new_session=True,
            )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            pickle.dump((self.settings, self.key), self.process.stdin)
            self.process.stdin.flush()

    def end_of_log(self) -> str:
        """Return the last lines of its output."""
        with self.log.open(errors="replace") as lines:
            return "".join(deque(lines, maxlen=_SHOWN_LINES)).strip()

    def close(self) -> None:
        """Make the process end by itself, and kill what is left of it."""
        if self.process is not None:
            assert self.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_PATIENCE)
            self.kill()
        self._folder.cleanup()

    def kill(self) -> None:
        """Kill the process and vLLM's own, which survive if only the first is killed."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class LocalActor:
    """The way to an engine on this machine; `RayActor` has the same methods."""

    losses: tuple[type[Exception], ...] = (EOFError, OSError)
    """What a call raises when the engine's process is gone."""

    def __init__(self, address: str, key: bytes, process: HostProcess | None) -> None:
        """`process` is the engine's, if this rank owns it."""
        self.address = address
        self.key = key
        self.process = process
        self._proxy: Any = None

    def start(self) -> None:
        """Start the process if this rank owns it."""
        self._proxy = None
        if self.process is not None:
            self.process.start()

    def ready(self, timeout: float) -> None:
        """Wait until it has loaded its model.

        Raises:
            RunFailed: it has ended, or is not ready in time.
        """
        deadline = time.monotonic() + timeout
        while True:
            try:
                manager = EngineManager(self.address, self.key)
                manager.connect()
                self._proxy = manager.engine()  # type: ignore[attr-defined]
                return
            except (OSError, EOFError) as error:
                if self.process is not None and self.process.process.poll() is not None:  # type: ignore[union-attr]
                    raise RunFailed("its process has ended") from error
                if time.monotonic() > deadline:
                    raise RunFailed(f"it was not ready within {timeout:g} s") from error
            time.sleep(_PAUSE)

    def call(self, name: str, arguments: dict[str, Any]) -> Future:
        """Call the engine in a thread, with a connection of its own; returns at once."""
        answer: Future = Future()
        threading.Thread(
            target=_settle, args=(answer, self._proxy.call, name, arguments), daemon=True
        ).start()
        return answer

    def trainer_address(self) -> str:
        """Return the address by which the engine reaches this process."""
        return "127.0.0.1"

    def about(self) -> str:
        """Say where its output is, to follow an error's text."""
        return f" (see {self.process.log})" if self.process is not None else ""

    def last_words(self) -> str:
        """Return the end of its output."""
        if self.process is None:
            return ""
        return f"; the end of its log:\n{self.process.end_of_log()}"

    def kill(self) -> None:
        """Kill its processes, if this rank owns them."""
        if self.process is not None:
            self.process.kill()

    def close(self) -> None:
        """End its processes, if this rank owns them."""
        if self.process is not None:
            self.process.close()


def _settle(answer: Future, do: Callable[..., Any], *arguments: Any) -> None:
    try:
        answer.set_result(do(*arguments))
    except BaseException as error:
        answer.set_exception(error)


EngineManager.register("engine", exposed=("call",))
