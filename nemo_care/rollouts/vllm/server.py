"""One engine as its users call it: from several threads, each for a user; needs no vLLM itself.

It is the object in the process of a local engine (`host.py`), and the Ray actor of an engine on
another machine (`cluster.py`).
"""

import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from nemo_care.process.screen import say
from nemo_care.rollouts.vllm.messages import CallFailed, EngineFailed, EngineSettings, SampleRequest

T = TypeVar("T")


class EngineServer:
    """Executes the calls of all users in one thread, which also loads the model.

    Calls are executed in the order in which they arrive. A generation is many short calls, so those
    of several users run together.
    """

    def __init__(self, settings: EngineSettings) -> None:
        """Load the model; takes seconds to minutes."""
        self._thread = ThreadPoolExecutor(1)

        def load() -> Any:
            from nemo_care.rollouts.vllm.llm import Engine

            return Engine(settings)

        self._engine = self._in_order(load)

    def call(self, name: str, arguments: dict[str, Any]) -> Any:
        """Call a method of the engine, or generate.

        Raises:
            CallFailed: vLLM refuses it.
            EngineFailed: vLLM has failed.
        """
        try:
            if name == "generate":
                return self._generate(**arguments)
            return self._in_order(getattr(self._engine, name), **arguments)
        except Exception as error:
            say(traceback.format_exc(), file=sys.stderr, end="")
            kind = EngineFailed if self._engine.is_dead(error) else CallFailed
            raise kind(f"{type(error).__name__}: {error}") from None

    def close(self) -> None:
        """End vLLM's processes, at once even if it computes."""
        self._engine.close()

    def _generate(self, requests: list[SampleRequest]) -> list[Any]:
        batch: Future = self._in_order(self._engine.submit, requests)
        while not batch.done():
            # It computes the next token for all users.
            self._in_order(self._engine.step)
        return batch.result()

    def _in_order(self, do: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
        return self._thread.submit(do, *arguments, **keywords).result()
