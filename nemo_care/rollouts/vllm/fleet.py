"""The engines of one replica: started or connected to, each by the rank that owns it."""

import gc
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from nemo_care.errors import InputError
from nemo_care.process.environment import VLLM_KEY
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.vllm import VLLMConfig
from nemo_care.rollouts.vllm.engine import Engine, HostProcess
from nemo_care.rollouts.vllm.messages import EngineSettings
from nemo_care.rollouts.vllm.placement import Share, colocate, share


class Fleet:
    """The engines of this rank's replica, as far as this rank uses them.

    `count` engines take the replica's prompts in turns. `own` are those that this rank calls, with
    their places among them; `fed` are those to which it also sends weights. `feeds`: whether this
    replica's ranks take part in sending weights at all.
    """

    def __init__(
        self, vllm: VLLMConfig, settings: EngineSettings, ranks: Ranks, *, devices: int, logs: Path
    ) -> None:
        """Start the processes of local engines; `start` loads their models.

        `devices` are the ranks of one machine, `logs` the folder for the engines' output.
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
        self._begun: list[Future] = []
        self._ready = False
        if vllm.placement == "colocated":
            self._colocate()
        elif vllm.hosts is not None:
            self._join(vllm.hosts)
        else:
            self._separate(vllm.gpus or [])
        # An engine measures how much GPU memory is free while it starts: next to training it has to
        # wait until the trainer has allocated its share.
        if not (vllm.placement == "colocated" and torch.cuda.is_available()):
            self._begin()

    @property
    def fed(self) -> list[Engine]:
        """The engines to which this rank sends weights, and which it puts to sleep and wakes."""
        return [engine for _, engine in self.own] if self.feeds else []

    def start(self) -> None:
        """Load the models of this rank's engines in parallel, once, and wait for them.

        Raises:
            InputError: nothing listens at an address.
            RunFailed: an engine could not start.
        """
        if self._ready:
            return
        self._begin()
        for begun in self._begun:
            begun.result()
        for _, engine in self.own:
            engine.ready()
        self._ready = True

    def _begin(self) -> None:
        """Make the engines load their models, in the background."""
        if self._begun or not self.own:
            return
        pool = ThreadPoolExecutor(len(self.own))
        self._begun = [pool.submit(engine.begin) for _, engine in self.own]
        pool.shutdown(wait=False)

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
        """Disconnect from the engines."""
        for _, engine in self.own:
            engine.close()
        self.own = []

    # ------------------------------------------------------------------ the three kinds

    def _colocate(self) -> None:
        placed = colocate(self.vllm, self.ranks.model_ranks, self.devices)
        gpus = dict(self.ranks.gather_in_replica((self.ranks.rank, _gpu())))
        self.count = len(placed.blocks)
        for place, block in enumerate(placed.blocks):
            if block[0] == self.ranks.rank:
                visible = [gpu for rank in block if (gpu := gpus[rank]) is not None]
                self._start_process(place, visible or None)

    def _separate(self, gpus: Sequence[int]) -> None:
        """Start engines on this machine, whose replicas share them."""
        size = self.vllm.tensor_parallel_size
        machine = self.ranks.model_leader // self.devices
        machines = self.ranks.gather_from_replicas(machine)
        here = [replica for replica, where in enumerate(machines) if where == machine]
        shared = share(
            len(gpus) // size, here, self.ranks.data_rank, f"rollout.vllm.gpus={list(gpus)}"
        )
        self._take(shared)
        if self.ranks.is_model_leader and self.feeds:
            on_gpu = torch.cuda.is_available()
            for place, number in enumerate(shared.engines):
                visible = [str(gpu) for gpu in gpus[number * size : (number + 1) * size]]
                self._start_process(place, visible if on_gpu else None)
        # The replicas that share an engine need its address.
        mine = [(engine.address, engine.key) for _, engine in self.own]
        addresses = self.ranks.gather_from_replicas(mine)
        if self.ranks.is_model_leader and not self.feeds:
            for place, (address, key) in enumerate(addresses[shared.sharers[0]]):
                self._connect(place, address, key)

    def _join(self, hosts: Sequence[str]) -> None:
        key = hosts_key()
        replicas = range(self.ranks.data_size)
        shared = share(
            len(hosts), replicas, self.ranks.data_rank, f"rollout.vllm.hosts={list(hosts)}"
        )
        self._take(shared)
        if self.ranks.is_model_leader:
            for place, number in enumerate(shared.engines):
                self._connect(place, hosts[number], key)

    def _take(self, shared: Share) -> None:
        self.count = len(shared.engines)
        self.feeds = shared.sharers[0] == self.ranks.data_rank

    def _start_process(self, place: int, gpus: Sequence[str] | None) -> None:
        name = f"{self.ranks.data_rank}.{place}"
        process = HostProcess(self.logs / f"vllm_{name}.log", gpus)
        self._add(place, Engine(
            name, process.address, process.key, self.settings,
            timeout=self.vllm.timeout_seconds, process=process,
        ))  # fmt: skip

    def _connect(self, place: int, address: str, key: str) -> None:
        self._add(place, Engine(
            f"at {address}", address, key, self.settings, timeout=self.vllm.timeout_seconds
        ))  # fmt: skip

    def _add(self, place: int, engine: Engine) -> None:
        self.own.append((place, engine))


def hosts_key() -> str:
    """Return the secret of engines on other machines.

    Raises:
        InputError: it is not set in the environment.
    """
    key = VLLM_KEY.value
    if not key:
        raise InputError(
            "rollout.vllm.hosts needs the engines' secret in the environment: set "
            f"{VLLM_KEY} to the value used where they were started"
        )
    return key


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
