"""GPUs that a plan can be made for."""

from dataclasses import dataclass

from nemo_care.errors import InputError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes as torch reports it, dense bf16 FLOPs and memory bytes per second."""

    name: str
    memory: int
    flops: float
    bytes_per_second: float


# NVIDIA's data sheets (SXM where there is a choice); memory is what the driver leaves.
_GPUS = {
    "a100-40gb": (39.4, 312, 1.55),
    "a100-80gb": (79.2, 312, 2.04),
    "l40s-48gb": (44.4, 362, 0.86),
    "h100-80gb": (79.1, 989, 3.35),
    "h200-141gb": (139.7, 989, 4.8),
    "b200-180gb": (178.0, 2250, 8.0),
}
DEFAULT_GPU = "h100-80gb"


def gpu_names() -> list[str]:
    """Names that `read_gpu` takes."""
    return sorted(_GPUS)


def read_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """A GPU by its name, with another memory where that is given.

    Raises:
        InputError: an unknown name or no memory.
    """
    if name not in _GPUS:
        raise InputError(f"--gpu {name}: choose {', '.join(gpu_names())}, or --gpu-memory-gib")
    if memory_gib is not None and memory_gib <= 0:
        raise InputError(f"--gpu-memory-gib {memory_gib}: must be above 0")
    gib, teraflops, terabytes = _GPUS[name]
    memory = int((memory_gib or gib) * GIB)
    label = name if memory_gib is None else f"{name} with {memory_gib:g} GiB"
    return Gpu(label, memory, teraflops * 1e12, terabytes * 1e12)
