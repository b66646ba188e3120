"""The recipe's keys under `rollout.vllm`: placement and resources of vLLM."""

from dataclasses import dataclass

from nemo_care.errors import InputError


@dataclass
class VLLMConfig:
    """Rollouts with vLLM; used if rollout.backend is vllm (see docs/vllm.md)."""

    placement: str = "colocated"
    """colocated: on the training GPUs, alternating with training; separate: on separate GPUs, given
    by rollout.vllm.gpus, or on a Ray cluster (rollout.vllm.ray_address)."""
    tensor_parallel_size: int = 1
    """GPUs per engine, independent of the trainer's tensor parallel size. Colocated, this number of
    ranks of a model replica share an engine, and the replica's prompts are distributed over its
    engines."""
    gpus: list[int] | None = None
    """Separate, on the machine of each replica's first rank: numbers of GPUs that do not train, as
    in CUDA_VISIBLE_DEVICES. Every tensor_parallel_size of them form an engine. Several replicas on
    one machine share them in order."""
    ray_address: str | None = None
    """Separate, elsewhere: NODE:PORT of a Ray cluster that was started before, in which the
    training machines take part without GPUs."""
    engines: int | None = None
    """With ray_address: number of engines on the cluster; all replicas share them in order."""
    gpu_memory_utilization: float = 0.6
    """Share of each GPU's memory used by an awake engine: weights, activations and key-value cache
    together."""
    kv_cache_gib: float | None = None
    """Memory of the key-value cache on each GPU; null: what gpu_memory_utilization leaves. On a
    machine without GPUs it is CPU memory."""
    sleep_level: int = 2
    """Colocated, during training: 2 releases all memory, and the weights are sent again for the
    next rollout; 1 keeps vLLM's weights in CPU memory; 0 stays awake. Without GPUs it stays
    awake."""
    enforce_eager: bool = False
    """Neither compile nor capture CUDA graphs: starts sooner, generates more slowly."""
    bucket_mib: int = 512
    """Weights are sent to vLLM in pieces of about this size; colocated, through a buffer of this
    size or, if larger, that of the largest tensor."""
    timeout_seconds: float = 1800.0
    """An engine counts as dead if it takes longer to start, to receive a piece of weights or to
    complete its prompts."""
    max_restarts: int = 2
    """Number of times that an engine that died is started again, in each start of the run; it gets
    the weights, and its prompts are sampled again with their seeds. After that the run saves a
    checkpoint and exits with status 75."""


def check_vllm(vllm: VLLMConfig) -> None:
    """Check the keys under `rollout.vllm` against each other; their ranges are in schema.py."""
    prefix = "rollout.vllm."
    if vllm.placement == "colocated":
        for name in ("gpus", "ray_address", "engines"):
            if getattr(vllm, name) is not None:
                raise InputError(
                    f"{prefix}{name} is for {prefix}placement=separate; the engines of "
                    "placement=colocated run on the training GPUs: omit it"
                )
        return
    if (vllm.gpus is None) == (vllm.ray_address is None):
        raise InputError(
            f"{prefix}placement=separate needs either {prefix}gpus (GPUs of the training "
            f"machines) or {prefix}ray_address (a Ray cluster): give one of them"
        )
    if (vllm.engines is None) != (vllm.ray_address is None):
        raise InputError(
            f"{prefix}engines is the number of engines on the cluster of {prefix}ray_address: give "
            "both or neither"
        )
    if vllm.gpus is not None:
        _check_gpus(vllm, prefix)
    elif ":" not in (vllm.ray_address or ""):
        raise InputError(f"{prefix}ray_address={vllm.ray_address} is not NODE:PORT")


def _check_gpus(vllm: VLLMConfig, prefix: str) -> None:
    gpus, size = vllm.gpus or [], vllm.tensor_parallel_size
    if not gpus or len(gpus) % size:
        raise InputError(
            f"{prefix}gpus={gpus}: their number has to be a multiple of "
            f"{prefix}tensor_parallel_size={size}"
        )
    if len(set(gpus)) < len(gpus) or min(gpus) < 0:
        raise InputError(f"{prefix}gpus={gpus}: each GPU once, counted from 0")
