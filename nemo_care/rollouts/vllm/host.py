"""The process of one engine on the trainer's own machine.

Its user starts it (`local.py`), with the engine's settings pickled on stdin; it ends when stdin is
closed, so also with its user. The separate process keeps vLLM's GPUs, threads, and changes to other
packages out of the trainer, and lets the trainer compute while the engine generates.
"""

import os
import pickle
import signal
import sys
import threading
import traceback
from multiprocessing.managers import BaseManager

from nemo_care.process.screen import say
from nemo_care.rollouts.vllm.server import EngineServer

# Shutdown timeout of the engine, in seconds, after its user has closed stdin.
_PATIENCE = 20.0


class EngineManager(BaseManager):
    """Gives the processes of one machine access to an engine, over a socket in a private folder."""


def serve(engine: EngineServer, address: str, key: bytes) -> None:
    """Execute the calls of all processes that have the key, until this process ends."""
    EngineManager.register("engine", callable=lambda: engine, exposed=("call",))
    EngineManager(address, key).get_server().serve_forever()


def main(address: str) -> None:
    """Load the engine, and only then listen at `address`."""
    given = sys.stdin.buffer
    settings, key = pickle.load(given)
    engines: list[EngineServer] = []

    def end_with_stdin() -> None:
        given.read()
        # An engine that hangs would keep its GPUs' memory forever.
        threading.Timer(_PATIENCE, os.killpg, (0, signal.SIGKILL)).start()
        for engine in engines:
            engine.close()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_stdin, daemon=True).start()
    engines.append(EngineServer(settings))
    serve(engines[0], address, key)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except Exception:
        say(traceback.format_exc(), file=sys.stderr, end="")
    sys.stderr.flush()
    # The thread that reads stdin would abort the interpreter's end.
    os._exit(1)
