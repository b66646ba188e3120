"""The engines of a run, their GPUs, and which model replica uses which of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_care.errors import InputError
from nemo_care.models.architecture import Architecture
from nemo_care.recipe.vllm import VLLMConfig


@dataclass(frozen=True)
class Share:
    """One replica's share of engines on separate GPUs.

    `engines` are their numbers; `sharers` are the replicas that use the same ones, in order. The
    first of them starts the engines and sends them the weights.
    """

    engines: tuple[int, ...]
    sharers: tuple[int, ...]


def colocate(vllm: VLLMConfig, replica: Sequence[int], devices: int) -> tuple[tuple[int, ...], ...]:
    """Return for each engine of a replica the ranks whose GPUs it shares; the first owns it.

    `replica` are its ranks (ascending), `devices` is the ranks per machine.

    Raises:
        InputError: the ranks do not fill whole engines, or an engine would span two machines.
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
    return blocks


def share(engines: int, replicas: Sequence[int], mine: int, key: str) -> Share:
    """Return the share of replica `mine` in `engines` engines that all of `replicas` use.

    There are several engines per replica, or several replicas per engine.

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
    """Refuse a placement before any rank starts that the ranks would refuse.

    Args:
        vllm: the recipe's keys.
        devices: number of ranks per machine.
        replicas: number of model replicas.
        tensor, pipeline: sizes of the trainer's layout.

    Raises:
        InputError: as in `colocate` and `share`, or a rank trains on an engine's GPU.
    """
    if vllm.placement == "colocated":
        # Megatron numbers tensor-parallel ranks first, then replicas, then stages.
        stages = range(0, tensor * replicas * pipeline, tensor * replicas)
        for first in range(0, tensor * replicas, tensor):
            ranks = [stage + first + rank for stage in stages for rank in range(tensor)]
            colocate(vllm, ranks, devices)
    elif vllm.engines is not None:
        share(vllm.engines, range(replicas), 0, f"rollout.vllm.engines={vllm.engines}")
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
        # Without a GPU, and so in every plan, the ranks' GPU numbers are unknown.
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
    """Refuse a tensor-parallel size by which vLLM can't divide the model.

    Unlike Megatron, vLLM divides the vision tower too, and copies a key-value head to several ranks
    if there are more ranks than heads.

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
