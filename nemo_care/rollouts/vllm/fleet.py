"""The engines of one replica: started or found, each by the rank that owns it or uses it."""

import gc
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.vllm import VLLMConfig
from nemo_care.rollouts.vllm import cluster
from nemo_care.rollouts.vllm.engine import Actor, Engine
from nemo_care.rollouts.vllm.local import HostProcess, LocalActor
from nemo_care.rollouts.vllm.messages import EngineSettings
from nemo_care.rollouts.vllm.placement import Share, colocate, share


class Fleet:
    """The engines of this rank's replica, as far as this rank uses them.

    `count` engines take the replica's prompts in turns. `own` are those that this rank calls, with
    their places among them; `fed` are those to which it also sends weights, and which it starts.
    `feeds`: whether this replica's ranks take part in sending weights at all.
    """

    def __init__(
        self, vllm: VLLMConfig, settings: EngineSettings, ranks: Ranks, *, devices: int, logs: Path
    ) -> None:
        """Assign the engines; `start` loads their models, if it has not begun here.

        `devices` are the ranks of one machine, `logs` the folder for the output of engines there.
        Collective over all ranks.
        """
        self.vllm = vllm
        self.settings = settings
        self.ranks = ranks
        self.devices = devices
        self.logs = logs
        self.bucket_bytes = vllm.bucket_mib * 2**20
        self.own: list[tuple[int, Engine]] = []
        self.feeds = True
        self.sleep_level = sleep_level(vllm)
        if vllm.placement == "colocated":
            self._colocate()
        elif vllm.ray_address is not None:
            self._join(vllm.ray_address)
        else:
            self._separate(vllm.gpus or [])
        # An engine measures how much GPU memory is free while it starts: next to training it has to
        # wait until the trainer has allocated its share.
        if not (vllm.placement == "colocated" and torch.cuda.is_available()):
            for engine in self.fed:
                engine.begin()

    @property
    def fed(self) -> list[Engine]:
        """The engines to which this rank sends weights, and which it puts to sleep and wakes."""
        return [engine for _, engine in self.own] if self.feeds else []

    def start(self) -> None:
        """Load the models of this rank's engines, and wait for them. Collective over all ranks.

        Raises:
            RunFailed: an engine could not start.
        """
        for engine in self.fed:
            engine.begin()
        self._together([engine for _, engine in self.own], Engine.ready)

    def restart(self) -> list[str]:
        """Start again the engines that any rank has found dead; return how they have died.

        Collective over all ranks, which get the same texts.

        Raises:
            EnginesLost: one of them does not start again, or has died too often.
        """
        mine = [(engine.name, engine.death) for _, engine in self.own if engine.death is not None]
        dead = {
            name: death
            for of_replica in self.ranks.gather_from_replicas(self.ranks.gather_in_replica(mine))
            for of_rank in of_replica
            for name, death in of_rank
        }
        again = [engine for _, engine in self.own if engine.name in dead]
        for engine in again:
            engine.death = dead[engine.name]
        self._together(again, Engine.restart if self.feeds else Engine.rejoin)
        return list(dead.values())

    def _together(self, engines: Sequence[Engine], do: Callable[[Engine], None]) -> None:
        """Do this to engines at the same time; ranks that share engines follow their owners."""

        def mine() -> None:
            with ThreadPoolExecutor(max(len(engines), 1)) as pool:
                list(pool.map(do, engines))

        self.ranks.together(mine if self.feeds else lambda: None)
        self.ranks.together(lambda: None if self.feeds else mine())

    def make_room(self) -> None:
        """Return GPU memory that training has freed to CUDA. Collective over all ranks.

        torch caches it, but an engine that starts or wakes on this GPU takes its share from the
        memory that is free in CUDA.
        """
        if self.vllm.placement == "colocated" and torch.cuda.is_available():
            gc.collect()
            torch.cuda.empty_cache()
            # An engine uses memory of several ranks' GPUs.
            self.ranks.barrier()

    def close(self) -> None:
        """End the engines that this rank owns."""
        for _, engine in self.own:
            engine.close()
        if self.own and self.vllm.ray_address is not None:
            cluster.disconnect()
        self.own = []

    # ------------------------------------------------------------------ the three kinds

    def _colocate(self) -> None:
        blocks = colocate(self.vllm, self.ranks.model_ranks, self.devices)
        gpus = dict(self.ranks.gather_in_replica((self.ranks.rank, _gpu())))
        self.count = len(blocks)
        for place, block in enumerate(blocks):
            if block[0] == self.ranks.rank:
                visible = [gpu for rank in block if (gpu := gpus[rank]) is not None]
                name = f"{self.ranks.data_rank}.{place}"
                self._add(place, name, _owned(self._process(name, visible or None)))

    def _separate(self, gpus: Sequence[int]) -> None:
        """Use engines on this machine, which its replicas share."""
        size = self.vllm.tensor_parallel_size
        machine = self.ranks.model_leader // self.devices
        machines = self.ranks.gather_from_replicas(machine)
        here = [replica for replica, where in enumerate(machines) if where == machine]
        shared = share(
            len(gpus) // size, here, self.ranks.data_rank, f"rollout.vllm.gpus={list(gpus)}"
        )
        self._take(shared)
        processes = []
        if self.ranks.is_model_leader and self.feeds:
            on_gpu = torch.cuda.is_available()
            for place, number in enumerate(shared.engines):
                visible = [str(gpu) for gpu in gpus[number * size : (number + 1) * size]]
                name = f"{self.ranks.data_rank}.{place}"
                processes.append(self._process(name, visible if on_gpu else None))
                self._add(place, name, _owned(processes[-1]))
        # The replicas that share an engine need its address.
        mine = [(process.address, process.key) for process in processes]
        addresses = self.ranks.gather_from_replicas(mine)
        if self.ranks.is_model_leader and not self.feeds:
            owner = shared.sharers[0]
            for place, (address, key) in enumerate(addresses[owner]):
                self._add(place, f"{owner}.{place}", LocalActor(address, key, None))

    def _join(self, address: str) -> None:
        """Use engines of a Ray cluster, which all replicas share."""
        count = self.vllm.engines or 0
        replicas = range(self.ranks.data_size)
        key = f"rollout.vllm.engines={count}"
        shared = share(count, replicas, self.ranks.data_rank, key)
        self._take(shared)
        namespace = self.ranks.from_rank_zero(lambda: f"nemo-care-{uuid.uuid4().hex}")

        def connect() -> None:
            if self.ranks.is_model_leader:
                cluster.connect(address, namespace)
                cluster.check_gpus(count, self.vllm.tensor_parallel_size)

        self.ranks.together(connect)
        if self.ranks.is_model_leader:
            for place, number in enumerate(shared.engines):
                settings = self.settings if self.feeds else None
                self._add(place, str(number), cluster.RayActor(f"engine {number}", settings))

    def _take(self, shared: Share) -> None:
        self.count = len(shared.engines)
        self.feeds = shared.sharers[0] == self.ranks.data_rank

    def _process(self, name: str, gpus: Sequence[str] | None) -> HostProcess:
        return HostProcess(self.settings, self.logs / f"vllm_{name}.log", gpus)

    def _add(self, place: int, name: str, actor: Actor) -> None:
        engine = Engine(
            name, actor, self.settings,
            timeout=self.vllm.timeout_seconds, max_restarts=self.vllm.max_restarts,
        )  # fmt: skip
        self.own.append((place, engine))


def _owned(process: HostProcess) -> LocalActor:
    return LocalActor(process.address, process.key, process)


def sleep_level(vllm: VLLMConfig) -> int:
    """Return the sleep level between rollouts; without GPUs there is no memory to free."""
    sleeps = vllm.placement == "colocated" and torch.cuda.is_available()
    return vllm.sleep_level if sleeps else 0


def _gpu() -> str | None:
    """Return this rank's GPU in CUDA_VISIBLE_DEVICES's form for any process; None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"GPU-{properties.uuid}"
