"""Engines on other machines: actors of a Ray cluster, which was started before the run.

Each engine has a placement group that keeps its GPUs. An engine that fits on one machine uses
processes there; one that does not uses vLLM's own tensor parallelism over Ray. This module alone
imports Ray, and only if `rollout.vllm.ray_address` is set.
"""

import os
import signal
import socket
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Unanswered
from dataclasses import replace
from typing import Any

import torch

from nemo_care.errors import InputError, RunFailed, first_line
from nemo_care.rollouts.vllm.messages import EngineSettings
from nemo_care.rollouts.vllm.server import EngineServer

_KEY = "rollout.vllm.ray_address"
# Threads of an engine: one generation per replica that shares it, and a few short calls.
_CALLS = 64
_SECONDS = 10.0


def connect(address: str, namespace: str) -> None:
    """Connect this process to the cluster; names in `namespace` belong to this start of the run.

    Raises:
        InputError: Ray is missing, or no cluster answers, or this machine is not part of it.
    """
    ray = _ray()
    handler = signal.getsignal(signal.SIGTERM)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    node, _, port = address.rpartition(":")
    try:
        # Ray itself tries for minutes.
        socket.create_connection((node, int(port)), timeout=_SECONDS).close()
        ray.init(
            address=address,
            namespace=namespace,
            configure_logging=False,
            log_to_driver=False,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{_KEY}={address}: there is no Ray cluster, or this machine is not part of it "
            f"({first_line(error)}); start it with ray start --head, and on this machine with "
            f"ray start --address={address} --num-gpus=0"
        ) from error
    finally:
        # Ray ends the process on SIGTERM, which is a request to save and stop.
        signal.signal(signal.SIGTERM, handler)


def disconnect() -> None:
    """Leave the cluster; it ends what this process started there."""
    _ray().shutdown()


def check_gpus(engines: int, size: int) -> None:
    """Refuse more engines than the cluster has GPUs for.

    Raises:
        InputError: names both numbers.
    """
    if not torch.cuda.is_available():
        return
    there = int(_ray().cluster_resources().get("GPU", 0))
    if there < engines * size:
        raise InputError(
            f"rollout.vllm.engines={engines} of tensor_parallel_size={size} need {engines * size} "
            f"GPUs, and the Ray cluster has {there}: lower one of them, or start Ray on more "
            "machines (ray status lists them)"
        )


class RayActor:
    """The way to an engine of the cluster; `LocalActor` has the same methods."""

    def __init__(self, name: str, settings: EngineSettings | None) -> None:
        """`settings` if this rank owns the engine; the other ranks find it by its name."""
        self.name = name
        self.settings = settings
        self.losses: tuple[type[Exception], ...] = (_ray().exceptions.RayActorError,)
        self._starts = 0
        self._group: Any = None
        self._actor: Any = None

    def start(self) -> None:
        """Begin to load the model, or find the actor by its name."""
        ray = _ray()
        # The name of a dead actor can still be taken for a moment, so each start has its own.
        prefix = f"{self.name}, start "
        if self.settings is None:
            found = [name for name in ray.util.list_named_actors() if name.startswith(prefix)]
            newest = max(found, key=lambda name: int(name.removeprefix(prefix)), default=None)
            self._actor = None if newest is None else ray.get_actor(newest)
            return
        self._starts += 1
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        bundles, across = _bundles(self.settings.tensor_parallel_size)
        if self._group is None:
            self._group = placement_group(bundles, strategy="PACK")
        # With vLLM's own actors, each has a GPU and this one none.
        gpus = 0 if across else bundles[0].get("GPU", 0)
        self._actor = (
            ray.remote(EngineServer)
            .options(
                name=f"{prefix}{self._starts}",
                num_cpus=1,
                num_gpus=gpus,
                max_concurrency=_CALLS,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._group,
                    placement_group_bundle_index=0,
                    placement_group_capture_child_tasks=True,
                ),
            )
            .remote(replace(self.settings, executor="ray") if across else self.settings)
        )

    def ready(self, timeout: float) -> None:
        """Wait until it has loaded its model.

        Raises:
            RunFailed: it has ended, or is not ready in time, for example without free GPUs.
        """
        if self._actor is None:
            raise RunFailed(f"Ray has no actor {self.name}")
        try:
            self._actor.__ray_ready__.remote().future().result(timeout)
        except Unanswered:
            raise RunFailed(
                "it was not ready in time; ray status says whether the cluster has free GPUs"
            ) from None
        except self.losses as loss:
            raise RunFailed(str(loss).strip()) from loss

    def call(self, name: str, arguments: dict[str, Any]) -> Future:
        """Call the engine."""
        return self._actor.call.remote(name, arguments).future()

    def trainer_address(self) -> str:
        """Return this machine's address in the cluster."""
        return _ray().util.get_node_ip_address()

    def about(self) -> str:
        """Say where its output is."""
        return f" (its output is in Ray's logs, actor '{self.name}, start {self._starts}')"

    def last_words(self) -> str:
        """Return nothing: Ray has its output."""
        return ""

    def kill(self) -> None:
        """End the actor."""
        if self._actor is not None:
            _ray().kill(self._actor)

    def close(self) -> None:
        """End the actor and free its GPUs, if this rank owns it."""
        if self.settings is not None:
            self.kill()
            if self._group is not None:
                _ray().util.remove_placement_group(self._group)


def _bundles(size: int) -> tuple[list[dict[str, float]], bool]:
    """Return what an engine reserves, machine by machine, and whether it needs several machines."""
    if not torch.cuda.is_available():
        return [{"CPU": 1}], False
    most = max(node["Resources"].get("GPU", 0) for node in _ray().nodes() if node["Alive"])
    if size <= most:
        return [{"CPU": 1, "GPU": size}], False
    return [{"CPU": 1, "GPU": 1}] * size, True


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            f"{_KEY} needs the package ray: install it with pip install -e '.[vllm]'"
        ) from error
    return ray
