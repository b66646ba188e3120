"""The trainer's side of engines, wherever they run: calls, and what is done when one dies."""

from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Unanswered
from typing import Any

from nemo_care.errors import EnginesLost, RunFailed, first_line
from nemo_care.rollouts.vllm.cluster import RayActor
from nemo_care.rollouts.vllm.local import LocalActor
from nemo_care.rollouts.vllm.messages import CallFailed, EngineFailed, EngineSettings


class EngineDied(RunFailed):
    """An engine has died, or did not answer in time; it can be started again."""


Actor = LocalActor | RayActor
"""The way to an engine: a process of this machine, or an actor of Ray."""


class Engine:
    """One vLLM engine. Calls return at once with a future; any thread may call."""

    def __init__(
        self,
        name: str,
        actor: Actor,
        settings: EngineSettings,
        *,
        timeout: float,
        max_restarts: int,
    ) -> None:
        """Start nothing yet. `name` is the same on all ranks that use the engine.

        `timeout` limits the start and the wait for each reply, in seconds.
        """
        self.name = name
        self.actor = actor
        self.settings = settings
        self.timeout = timeout
        self.max_restarts = max_restarts
        self.restarts = 0
        # How it has died, if this rank has noticed that.
        self.death: str | None = None
        self._begun = False

    def begin(self) -> None:
        """Begin to load the model; `ready` waits for it."""
        if not self._begun:
            self._begun = True
            self.actor.start()

    def ready(self) -> None:
        """Wait until the model is loaded.

        Raises:
            RunFailed: it has ended before, or takes too long.
        """
        self.begin()
        try:
            self.actor.ready(self.timeout)
        except RunFailed as failure:
            self.death = (
                f"vLLM's engine {self.name} has not started (limit: rollout.vllm.timeout_seconds="
                f"{self.timeout:g}): {failure}{self.actor.about()}{self.actor.last_words()}"
            )
            raise RunFailed(self.death) from failure

    def call(self, name: str, **arguments: Any) -> Future:
        """Call a method of the engine; `wait` returns its result."""
        if self.death is not None:
            answer: Future = Future()
            answer.set_exception(EngineDied(self.death))
            return answer
        return self.actor.call(name, arguments)

    def ask(self, name: str, **arguments: Any) -> Any:
        """Call `call`, and wait for the reply."""
        return self.wait(self.call(name, **arguments), name)

    def wait(self, answer: Future, what: str) -> Any:
        """Return the reply.

        Raises:
            EngineDied: the engine has died, or not replied in time.
            RunFailed: the engine refused the call.
        """
        try:
            return answer.result(self.timeout)
        except CallFailed as failure:
            raise RunFailed(
                f"vLLM's engine {self.name}: {_original(failure)}{self.actor.about()}"
            ) from None
        except Unanswered:
            reason = f"did not answer ({what}) within rollout.vllm.timeout_seconds={self.timeout:g}"
        except EngineFailed as failure:
            reason = f"has died: {_original(failure)}"
        except self.actor.losses as loss:
            reason = f"has died: its process has ended ({first_line(loss)})"
        self.death = f"vLLM's engine {self.name} {reason}{self.actor.about()}"
        self.actor.kill()
        raise EngineDied(self.death)

    def restart(self) -> None:
        """Start the dead engine again, and wait until its model is loaded.

        Raises:
            EnginesLost: it was started again as often as rollout.vllm.max_restarts allows.
        """
        self.actor.kill()
        while True:
            if self.restarts == self.max_restarts:
                raise EnginesLost(
                    f"{self.death}; rollout.vllm.max_restarts={self.max_restarts} is used up"
                    f"{self.actor.last_words()}"
                )
            self.restarts += 1
            try:
                self.rejoin()
                return
            except RunFailed:
                self.actor.kill()

    def rejoin(self) -> None:
        """Use the engine after it was started again. Raises RunFailed if it is not there."""
        self.death, self._begun = None, False
        self.ready()

    def close(self) -> None:
        """End it, if this rank owns it."""
        self.actor.close()


class Engines:
    """vLLM's four steps of an update, for several engines at once; its `VLLMWeightSyncClient`."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        """Use engines that receive their weights from this rank."""
        self.engines = engines

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Shake hands. The workers of all engines are numbered consecutively."""
        infos = []
        for place, engine in enumerate(self.engines):
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] += place * engine.settings.tensor_parallel_size
            infos.append(info)
        self._all("init_weight_transfer_engine", [{"init_info": info} for info in infos])

    def start_weight_update(self) -> None:
        """Prepare for the first piece."""
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Load one piece, and return when all engines have it."""
        self._all("update_weights", [{"update_info": update_info}] * len(self.engines))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Finish after the last piece; engines discard what they computed with the old weights."""
        self._all("finish_weight_update")

    def _all(self, step: str, arguments: Sequence[dict[str, Any]] | None = None) -> None:
        each = arguments or [{}] * len(self.engines)
        answers = [engine.call(step, **own) for engine, own in zip(self.engines, each, strict=True)]
        for engine, answer in zip(self.engines, answers, strict=True):
            engine.wait(answer, step)


def _original(failure: Exception) -> Exception:
    """Return the engine's own error; Ray's copy of it has the traceback as its text."""
    return getattr(failure, "cause", failure)
