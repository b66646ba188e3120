"""Which engines there are, on which GPUs, and which model replica asks which of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_care.errors import InputError
from nemo_care.models.architecture import Architecture
from nemo_care.recipe.vllm import VLLMConfig


@dataclass(frozen=True)
class Colocated:
    """Engines of one replica: for each, the ranks whose GPUs it shares; the first one owns it."""

    blocks: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Share:
    """What one replica has of engines that stand apart.

    `engines` are their numbers; `sharers` the replicas that ask the same ones, in order. The first
    of them starts the engines and sends them the weights.
    """

    engines: tuple[int, ...]
    sharers: tuple[int, ...]


def colocate(vllm: VLLMConfig, replica: Sequence[int], devices: int) -> Colocated:
    """Deal a replica's ranks (ascending) to engines; `devices` are the ranks of one machine.

    Raises:
        InputError: the ranks do not make whole engines, or one would span two machines.
    """
    size, key = vllm.tensor_parallel_size, "rollout.vllm.tensor_parallel_size"
    if len(replica) % size:
        raise InputError(
            f"{key}={size} does not divide the {len(replica)} ranks of a model replica "
            "(model.tensor_model_parallel_size * model.pipeline_model_parallel_size), whose GPUs "
            "its engines share: choose a divisor, or rollout.vllm.placement=separate"
        )
    blocks = tuple(tuple(replica[start : start + size]) for start in range(0, len(replica), size))
    for block in blocks:
        if len({rank // devices for rank in block}) > 1:
            raise InputError(
                f"{key}={size}: ranks {block[0]} to {block[-1]} would share an engine but are on "
                f"several machines of trainer.devices={devices} ranks; choose a size within one "
                "machine"
            )
    return Colocated(blocks)


def share(engines: int, replicas: Sequence[int], mine: int, key: str) -> Share:
    """What replica `mine` has of `engines` engines that all of `replicas` ask.

    Several engines for each replica, or several replicas for each engine.

    Raises:
        InputError: neither number is a multiple of the other; `key` is the recipe's key to change.
    """
    count, place = len(replicas), replicas.index(mine)
    if engines % count == 0:
        each = engines // count
        return Share(tuple(range(place * each, (place + 1) * each)), (mine,))
    if count % engines == 0:
        each = count // engines
        first = place // each * each
        return Share((place // each,), tuple(replicas[first : first + each]))
    raise InputError(
        f"{key} makes {engines} engines for {count} model replicas: one number has to be a "
        "multiple of the other"
    )


def check_placement(
    vllm: VLLMConfig, *, devices: int, replicas: int, tensor: int, pipeline: int
) -> None:
    """Refuse, before any rank starts, what the ranks would refuse.

    Args:
        vllm: the recipe's keys.
        devices: ranks of one machine.
        replicas: of the model.
        tensor, pipeline: sizes of the trainer's layout.

    Raises:
        InputError: as `colocate` and `share`, or a rank trains on an engine's GPU.
    """
    if vllm.placement == "colocated":
        # Megatron counts tensor-parallel ranks first, then replicas, then stages.
        stages = range(0, tensor * replicas * pipeline, tensor * replicas)
        for first in range(0, tensor * replicas, tensor):
            ranks = [stage + first + rank for stage in stages for rank in range(tensor)]
            colocate(vllm, ranks, devices)
    elif vllm.hosts is not None:
        share(len(vllm.hosts), range(replicas), 0, f"rollout.vllm.hosts={vllm.hosts}")
    else:
        gpus = vllm.gpus or []
        _check_apart(gpus, devices)
        engines = len(gpus) // vllm.tensor_parallel_size
        where = [replica * tensor // devices for replica in range(replicas)]
        for machine in sorted(set(where)):
            here = [replica for replica in range(replicas) if where[replica] == machine]
            share(engines, here, here[0], f"rollout.vllm.gpus={gpus}")


def _check_apart(gpus: Sequence[int], devices: int) -> None:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named == "":
        # Without a GPU, and so in every plan, nobody knows which numbers the ranks will have.
        return
    visible = named.split(",") if named else [str(gpu) for gpu in range(devices)]
    training = visible[:devices]
    both = [gpu for gpu in gpus if str(gpu) in training]
    if both:
        raise InputError(
            f"rollout.vllm.gpus={list(gpus)}: GPU {both[0]} trains (trainer.devices={devices} "
            f"ranks take {', '.join(training)}); name others, or lower trainer.devices"
        )


def check_tensor_parallel(model: Architecture, size: int) -> None:
    """Refuse a tensor-parallel size that vLLM cannot cut the model into.

    Unlike Megatron, vLLM cuts the vision tower too, and gives several ranks the same key-value head
    where there are more ranks than heads.

    Raises:
        InputError: names the sizes that fit.
    """
    vision = model.vision
    heads, groups = model.heads, model.kv_heads

    def fits(size: int) -> bool:
        cut = (heads, model.ffn_size, vision.heads, vision.ffn_size)
        return not any(width % size for width in cut) and 0 in (groups % size, size % groups)

    if not fits(size):
        good = [str(size) for size in range(1, vision.heads + 1) if fits(size)]
        raise InputError(
            f"rollout.vllm.tensor_parallel_size={size} does not divide the model's {heads} "
            f"attention heads, {groups} key-value heads, and the vision tower's {vision.heads} "
            f"heads and {vision.ffn_size} wide layers: use {', '.join(good)}"
        )
