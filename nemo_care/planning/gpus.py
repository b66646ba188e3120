"""GPUs that a plan can be made for."""

from dataclasses import dataclass

from nemo_care.errors import InputError

GIB = 2**30


def gib(size: float) -> str:
    """Format bytes in GiB with one digit; an en dash for zero."""
    return f"{size / GIB:.1f}" if size else "–"


@dataclass(frozen=True)
class Gpu:
    """Memory in bytes as torch reports it, dense bf16 and 8-bit FLOPs (0 without 8 bits), memory
    bytes per second, CUDA's compute capability."""

    name: str
    memory: int
    flops: float
    fp8_flops: float
    bytes_per_second: float
    capability: tuple[int, int]


# NVIDIA's data sheets (SXM if there is a choice); memory is what the driver leaves free.
_GPUS = {
    "a100-40gb": (39.4, 312, 0, 1.55, (8, 0)),
    "a100-80gb": (79.2, 312, 0, 2.04, (8, 0)),
    "l40s-48gb": (44.4, 362, 733, 0.86, (8, 9)),
    "h100-80gb": (79.1, 989, 1979, 3.35, (9, 0)),
    "h200-141gb": (139.7, 989, 1979, 4.8, (9, 0)),
    "b200-180gb": (178.0, 2250, 4500, 8.0, (10, 0)),
}
DEFAULT_GPU = "h100-80gb"


def gpu_names() -> list[str]:
    """Return the names that `read_gpu` accepts."""
    return sorted(_GPUS)


def read_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """Return a GPU by its name, with a different memory size if given.

    Raises:
        InputError: an unknown name or no memory.
    """
    if name not in _GPUS:
        raise InputError(f"--gpu {name}: choose {', '.join(gpu_names())}, or --gpu-memory-gib")
    if memory_gib is not None and memory_gib <= 0:
        raise InputError(f"--gpu-memory-gib {memory_gib}: must be above 0")
    gib, teraflops, fp8_teraflops, terabytes, capability = _GPUS[name]
    memory = int((memory_gib or gib) * GIB)
    label = name if memory_gib is None else f"{name} with {memory_gib:g} GiB"
    flops = (teraflops * 1e12, fp8_teraflops * 1e12)
    return Gpu(label, memory, *flops, terabytes * 1e12, capability)
