"""The process of one vLLM engine, which executes the calls of connected trainers.

    python -m nemo_care.rollouts.vllm.host --listen 0.0.0.0:5600

Trainers start it themselves on their own machines. On other machines it is started by hand or by a
batch script, with the trainers' secret in its environment (docs/vllm.md); it uses the first
trainer's settings and exits when the last trainer has disconnected.

The separate process keeps vLLM's GPUs, threads, and changes to other packages out of the trainer,
and lets the trainer compute while the engine generates.
"""

import argparse
import errno
import os
import queue
import signal
import sys
import threading
import time
import traceback
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener
from typing import TYPE_CHECKING

from nemo_care.process.environment import VLLM_KEY
from nemo_care.process.screen import say
from nemo_care.rollouts.vllm.connections import address_of, bound_sending, greet, hang_up
from nemo_care.rollouts.vllm.messages import LEAVE, Call, EngineSettings, Reply

if TYPE_CHECKING:
    from nemo_care.rollouts.vllm.llm import Engine

# Shutdown timeout of the engine, in seconds, after the parent process has exited.
_PATIENCE = 60.0

# A trainer that receives no reply for this time is disconnected, because it blocks all others.
_SEND_SECONDS = 60.0
# Limit of clients that have connected but not authenticated yet; more are refused.
_MOST_STRANGERS = 64

# From a connection's reader: the client and its call, None if it has disconnected. Without a
# client: the parent process has exited.
Event = tuple[Connection | None, Call | None]


class Host:
    """Serves one engine. Only the main thread uses it; readers fill a queue."""

    def __init__(self, listener: Listener, key: bytes, *, watches_stdin: bool = False) -> None:
        """Use an open `listener` without a key, which would authenticate clients one by one.

        With `watches_stdin`, the end of stdin means that the parent process has exited: without
        trainers, the host exits then too.
        """
        self.key = key
        self.strangers = threading.BoundedSemaphore(_MOST_STRANGERS)
        self.watches_stdin = watches_stdin
        self.listener = listener
        self.events: queue.Queue[Event] = queue.Queue()
        self.clients: set[Connection] = set()
        self.engine: Engine | None = None
        self.settings: EngineSettings | None = None

    def serve(self) -> int:
        """Serve until the last trainer has disconnected; return the exit status."""
        threading.Thread(target=self._accept, daemon=True).start()
        if self.watches_stdin:
            threading.Thread(target=self._watch, daemon=True).start()
        try:
            while True:
                busy = self.engine is not None and self.engine.is_busy
                if not busy or not self.events.empty():
                    client, call = self.events.get()
                    if client is None or call is None:
                        if client is not None:
                            self.clients.discard(client)
                        if not self.clients:
                            return 0
                        continue
                    self._answer(client, call)
                else:
                    assert self.engine is not None
                    for finished, reply in self.engine.step():
                        self._send(finished, reply)
        except Exception as error:
            # The engine has failed: all clients that wait for it must be notified.
            say(traceback.format_exc(), file=sys.stderr, end="")
            text = f"{type(error).__name__}: {error}"
            for client in self.clients:
                self._send(client, Reply(-1, error=text))
            return 1
        finally:
            if self.engine is not None:
                self.engine.close()

    def _accept(self) -> None:
        while True:
            try:
                client = self.listener.accept()
            except OSError as error:
                if error.errno in (None, errno.EBADF, errno.EINVAL):  # it was closed
                    return
                say(f"a client could not be accepted: {error}", file=sys.stderr)
                time.sleep(0.1)
                continue
            if not self.strangers.acquire(blocking=False):
                client.close()
                continue
            threading.Thread(target=self._meet, args=(client,), daemon=True).start()

    def _meet(self, client: Connection) -> None:
        """Authenticate a client, and then serve it, in a separate thread."""
        try:
            greet(client, self.key)
            bound_sending(client, _SEND_SECONDS)
        except (AuthenticationError, OSError, EOFError) as error:
            say(f"a client was turned away: {error or 'it disconnected'}", file=sys.stderr)
            client.close()
            return
        finally:
            self.strangers.release()
        self.clients.add(client)
        self._read(client)

    def _watch(self) -> None:
        sys.stdin.read()
        self.events.put((None, None))
        time.sleep(_PATIENCE)
        # An engine that hangs blocks the main thread, and would keep its GPUs' memory forever.
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    def _read(self, client: Connection) -> None:
        while True:
            try:
                call = client.recv()
            except (EOFError, OSError):
                call = None
            except Exception as error:  # in unpickling, for example of another version
                say(f"a trainer is disconnected: {type(error).__name__}: {error}", file=sys.stderr)
                call = None
            if not isinstance(call, Call) or call.name == LEAVE:
                self.events.put((client, None))
                client.close()
                return
            self.events.put((client, call))

    def _answer(self, client: Connection, call: Call) -> None:
        """Execute a call; the reply to a generation is sent by later steps."""
        try:
            if call.name == "open":
                self._open(**call.arguments)
                value = None
            elif self.engine is None:
                raise RuntimeError("no engine was opened")
            elif call.name == "generate":
                self.engine.submit(client, call.number, **call.arguments)
                return
            else:
                value = getattr(self.engine, call.name)(**call.arguments)
        except Exception as error:
            say(traceback.format_exc(), file=sys.stderr, end="")
            self._send(client, Reply(call.number, error=f"{type(error).__name__}: {error}"))
            if self.engine is not None and self.engine.is_fatal(error):
                raise
            return
        self._send(client, Reply(call.number, value))

    def _open(self, settings: EngineSettings) -> None:
        """Create the engine, or check that the existing one has the same settings."""
        if self.engine is None:
            from nemo_care.rollouts.vllm.llm import Engine

            self.settings = settings
            self.engine = Engine(settings)
        elif settings != self.settings:
            raise ValueError(f"this engine was opened with different settings: {self.settings}")

    @staticmethod
    def _send(client: Connection, reply: Reply) -> None:
        try:
            client.send(reply)
        except OSError:
            hang_up(client)  # its reader notifies the main thread


def main(arguments: list[str]) -> int:
    """Listen, serve, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nemo_care.rollouts.vllm.host")
    parser.add_argument("--listen", required=True, help="NODE:PORT, or the path of a socket")
    parser.add_argument("--watch-stdin", action="store_true", help="exit when stdin is closed")
    chosen = parser.parse_args(arguments)
    key = VLLM_KEY.value
    if not key:
        say(f"{VLLM_KEY} is not set: give engines and trainers the same secret", file=sys.stderr)
        return 2
    # As with any pickle, a client that can connect can run code here: hence the key.
    address = address_of(chosen.listen)
    with Listener(address, backlog=64) as listener:
        return Host(listener, key.encode(), watches_stdin=chosen.watch_stdin).serve()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads that read from connections would delay the interpreter's exit.
    os._exit(status)
