"""The trainer's side of an engine: a connection to its host, and its pending replies."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Unanswered
from itertools import count
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nemo_care.errors import InputError, RunFailed
from nemo_care.process.cores import unbound
from nemo_care.process.environment import RESOLVED_RECIPE, VLLM_KEY
from nemo_care.rollouts.vllm.connections import bound_sending, connect
from nemo_care.rollouts.vllm.messages import LEAVE, Call, EngineSettings, Reply

_SHOWN_LINES = 15
_PAUSE = 0.1


class HostProcess:
    """A host that this process has started."""

    def __init__(self, log: Path, gpus: Sequence[str] | None) -> None:
        """Start it with output to `log`; `gpus` as in CUDA_VISIBLE_DEVICES, None on CPUs."""
        # Not in the run directory, because a socket's path is limited to some hundred characters.
        self._folder = tempfile.TemporaryDirectory(prefix="nemo-care-")
        self.address = str(Path(self._folder.name) / "engine")
        self.key = VLLM_KEY.value or secrets.token_hex(32)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        # vLLM reads the same names, but must not use the addresses and settings of ranks.
        env = {k: v for k, v in os.environ.items() if k not in _RANK_VARIABLES}
        env[VLLM_KEY.name] = self.key
        # Otherwise every vLLM process loads plugins of other packages, such as NeMo's.
        env.setdefault("VLLM_PLUGINS", "")
        if gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        program = [sys.executable, "-m", "nemo_care.rollouts.vllm.host", "--watch-stdin"]
        # An engine can have GPUs of several NUMA nodes.
        with log.open("w") as output, unbound():
            self.process = subprocess.Popen(
                [*program, "--listen", self.address],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                # Signals for the trainer, such as a terminal's Ctrl-C, must only reach the trainer.
                start_new_session=True,
            )

    def end_of_log(self) -> str:
        """Return the last lines of its output."""
        with self.log.open(errors="replace") as lines:
            return "".join(deque(lines, maxlen=_SHOWN_LINES)).strip()

    def close(self, patience: float = 30.0) -> None:
        """Wait until it has exited, which it does when no client is connected any more."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self.end_group()
        self.process.wait()
        self._folder.cleanup()

    def end_group(self) -> None:
        """Kill the host and vLLM's own processes, which survive if only the host is killed."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


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


class Engine:
    """One vLLM engine. Calls return at once with a future; any thread may call."""

    def __init__(
        self,
        name: str,
        address: str,
        key: str,
        settings: EngineSettings,
        *,
        timeout: float,
        process: HostProcess | None = None,
    ) -> None:
        """Connect to nothing yet; `process` is the host if this process has started it.

        `timeout` limits the wait for each reply, in seconds.
        """
        self.name = name
        self.address = address
        self.key = key
        self.settings = settings
        self.timeout = timeout
        self.process = process
        self._connection: Connection | None = None
        self._opened: Future | None = None
        self._numbers = count()
        self._waiting: dict[int, Future] = {}
        self._lock = threading.Lock()
        self._dead: str | None = None
        self._left = False

    def call(self, name: str, **arguments: Any) -> Future:
        """Send a request; the future gets the reply, or RunFailed if the engine has died."""
        answer: Future = Future()
        with self._lock:
            if self._dead is not None:
                answer.set_exception(RunFailed(self._dead))
                return answer
            assert self._connection is not None, "open comes first"
            number = next(self._numbers)
            self._waiting[number] = answer
            try:
                self._connection.send(Call(number, name, arguments))
            except OSError as error:
                del self._waiting[number]
                reason = str(error)
                if isinstance(error, BlockingIOError):
                    reason = (
                        f"it took no request within rollout.vllm.timeout_seconds={self.timeout:g}"
                    )
                # The peer can't parse anything that follows a part of a message.
                self._dead = self._death(reason)
                answer.set_exception(RunFailed(self._dead))
        return answer

    def ask(self, name: str, **arguments: Any) -> Any:
        """Call `call`, and wait for the reply."""
        return self.wait(self.call(name, **arguments), name)

    def wait(self, answer: Future, what: str) -> Any:
        """Return the reply.

        Raises:
            RunFailed: the engine has failed, died, or not replied in time.
        """
        try:
            return answer.result(self.timeout)
        except Unanswered:
            raise RunFailed(
                f"vLLM's engine {self.name} did not answer ({what}) within "
                f"rollout.vllm.timeout_seconds={self.timeout:g}{self._log_hint()}"
            ) from None

    def begin(self) -> None:
        """Connect, and make the host load the model; `ready` waits for it.

        Raises:
            InputError: nothing listens at the recipe's address, or it has a different key.
            RunFailed: the host that was started has exited, or does not listen in time.
        """
        deadline = time.monotonic() + self.timeout
        while True:
            try:
                left = max(deadline - time.monotonic(), _PAUSE)
                self._connection = connect(self.address, self.key.encode(), left)
                bound_sending(self._connection, self.timeout)
                break
            except AuthenticationError as error:
                raise InputError(
                    f"rollout.vllm.hosts: the engine at {self.address} was started with another "
                    f"secret: give it the same {VLLM_KEY} as the trainers"
                ) from error
            # The connection has ended: the host disconnects, or it is another program.
            except (OSError, EOFError) as error:
                self._check_started(error, deadline)
            time.sleep(_PAUSE)
        threading.Thread(target=self._read, args=(self._connection,), daemon=True).start()
        self._opened = self.call("open", settings=self.settings)

    def ready(self) -> None:
        """Wait until the model is loaded."""
        assert self._opened is not None, "begin comes first"
        self.wait(self._opened, "start")

    def _check_started(self, error: Exception, deadline: float) -> None:
        """Raise an error unless a further attempt to connect makes sense."""
        if self.process is None:
            # The host may still be starting, but a name that does not resolve won't.
            if time.monotonic() > deadline or isinstance(error, socket.gaierror):
                raise InputError(
                    f"rollout.vllm.hosts: no engine at {self.address} ({error}); start python -m "
                    "nemo_care.rollouts.vllm.host there"
                ) from error
        elif self.process.process.poll() is not None:
            raise RunFailed(self._death("its process has ended")) from error
        elif time.monotonic() > deadline:
            raise RunFailed(
                f"vLLM's engine {self.name} did not listen within rollout.vllm.timeout_seconds="
                f"{self.timeout:g}{self._log_hint()}"
            ) from error

    def _read(self, connection: Connection) -> None:
        """In a thread: set the results of calls until the connection ends."""
        reason = "its process has ended"
        while True:
            try:
                reply = connection.recv()
            except (EOFError, OSError):
                break
            except (
                Exception
            ) as error:  # in unpickling: calls would never return without this thread
                reason = f"its reply can't be read: {type(error).__name__}: {error}"
                break
            if not isinstance(reply, Reply):
                reason = f"its reply is not a reply but {type(reply).__name__}"
                break
            if reply.number < 0:
                reason = reply.error or reason
                break
            with self._lock:
                answer = self._waiting.pop(reply.number, None)
            if answer is None:  # to a request that could not be sent
                continue
            if reply.error is not None:
                answer.set_exception(
                    RunFailed(f"vLLM's engine {self.name}: {reply.error}{self._log_hint()}")
                )
            else:
                answer.set_result(reply.value)
        with self._lock:
            self._dead = self._death(reason)
            waiting, self._waiting = list(self._waiting.values()), {}
        for answer in waiting:
            answer.set_exception(RunFailed(self._dead))
        if self.process is not None and not self._left:
            self.process.end_group()

    def _death(self, reason: str) -> str:
        message = f"vLLM's engine {self.name} has died: {reason}{self._log_hint()}"
        if self.process is not None:
            message += f"; the end of its log:\n{self.process.end_of_log()}"
        return message

    def _log_hint(self) -> str:
        return f" (see {self.process.log})" if self.process is not None else ""

    def close(self) -> None:
        """Disconnect; the host exits when the last client has disconnected."""
        self._left = True
        with self._lock:
            if self._dead is None and self._connection is not None:
                # Closing it here would not wake the thread that reads from it. The engine may have
                # died without notice.
                with contextlib.suppress(OSError):
                    self._connection.send(Call(-1, LEAVE, {}))
        if self.process is not None:
            self.process.close()
