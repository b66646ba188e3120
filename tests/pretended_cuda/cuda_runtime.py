"""Functions of torch that ask for CUDA outside of operators, replaced for the pretended device."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cuda_counts import COUNTS, place
from cuda_graphs import CUDAGraph, capture
from cuda_kernels import FusedRMSNorm
from cuda_rules import CUDA, MixedDevices, on_cuda
from cuda_tensors import CudaTensor, inner
from torch.nn.attention.bias import CausalBias
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

_GIB = 2**30
_DATA = torch._C.TensorBase.data
_SDPA = F.scaled_dot_product_attention
_RMS_NORM = torch.rms_norm
_INIT_PROCESS_GROUP = dist.init_process_group


class Stream:
    """A stream of the device: all work is done when it has been launched."""

    cuda_stream, device, device_index, stream_id = 0, CUDA, 0, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def synchronize(self) -> None:
        _synchronize()

    def wait_stream(self, stream: "Stream") -> None: ...

    def wait_event(self, event: "Event") -> None: ...

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: object) -> None: ...


class Event:
    """An event, which has always happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 0.0


def _synchronize(*args: Any) -> None:
    COUNTS.waits[f"synchronize {place()}"] += 1


def _check_error(status: int) -> None:
    if status:
        raise RuntimeError(f"CUDA error {status}")


def _always(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def replace_functions(host_register: Callable[[int, int], int]) -> None:
    """Replace them in this process; `host_register(address, bytes)` registers CPU memory."""
    generator_state = {
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
    }
    runtime = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: host_register(address, size),
        cudaError=SimpleNamespace(success=0),
        cudaGetErrorString=str,
    )
    h100 = SimpleNamespace(
        name="pretended H100",
        major=9,
        minor=0,
        total_memory=80 * _GIB,
        uuid="0",
        multi_processor_count=132,
        # Of a machine without NUMA nodes: nothing is bound.
        pci_domain_id=0xFFFF,
        pci_bus_id=0,
        pci_device_id=0,
    )
    functions = {
        **{name: _always(True) for name in ("is_available", "is_initialized", "_is_compiled")},
        "is_bf16_supported": _always(True),
        "is_current_stream_capturing": lambda: CUDAGraph.capturing is not None,
        "current_device": _always(0),
        "device_count": _always(int(os.environ.get("LOCAL_WORLD_SIZE", "2"))),
        "get_device_capability": _always((h100.major, h100.minor)),
        "get_device_name": _always(h100.name),
        "get_device_properties": _always(h100),
        "mem_get_info": _always((h100.total_memory, h100.total_memory)),
        **{name: _always(None) for name in _WITHOUT_EFFECT},
        **{f"{peak}memory_{kind}": _always(_GIB) for peak in ("", "max_") for kind in _MEMORY},
        **generator_state,
        "synchronize": _synchronize,
        "Stream": Stream,
        "Event": Event,
        "stream": _always(Stream()),
        "current_stream": _always(Stream()),
        "default_stream": _always(Stream()),
        "cudart": _always(runtime),
        "check_error": _check_error,
        "CUDAGraph": CUDAGraph,
        "graph": capture,
        "default_generators": (torch.default_generator,),
        **{f"{kind}Tensor": _maker(dtype) for kind, dtype in _KINDS.items()},
    }
    for name, value in functions.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = generator_state["get_rng_state"]
    torch.cuda.nvtx.range_push = _always(None)
    torch.cuda.nvtx.range_pop = _always(None)
    torch.accelerator.current_device_index = _always(0)
    torch.accelerator.synchronize = _synchronize
    torch.version.cuda = "13.0"
    _replace_tensor_functions()
    dist.init_process_group = _init_process_group
    dist.batch_isend_irecv = _batch_isend_irecv


_MEMORY = ("allocated", "reserved")
_WITHOUT_EFFECT = (
    *("_lazy_init", "set_device", "empty_cache", "ipc_collect"),
    *("manual_seed", "manual_seed_all", "reset_peak_memory_stats"),
)
_KINDS = {"Float": torch.float32, "Long": torch.int64, "Int": torch.int32}


def _maker(dtype: torch.dtype) -> Callable[[Any], torch.Tensor]:
    return lambda data: torch.tensor(data, dtype=dtype, device="cuda")


# ------------------------------------------------------------------ tensors


def _replace_tensor_functions() -> None:
    # `with torch.device(...)` keeps a list of functions that make tensors from its first use on: it
    # must hold the true ones, or transformers does not see that it builds a model on meta.
    _device_constructors()
    torch.tensor, torch.as_tensor = _made_there(torch.tensor), _made_there(torch.as_tensor)
    F.scaled_dot_product_attention = _attention
    torch.rms_norm = _rms_norm
    CausalBias.__new__ = _new_bias
    # Parameters that a module moves become new objects: their memory is another's.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    torch.Tensor.data = property(_DATA.__get__, _set_data)


def _made_there(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.tensor`, which copies to its device where no dispatcher sees it."""

    def made(data, *args, device=None, requires_grad=False, **kwargs):
        if isinstance(data, list | tuple):
            # It reads the values of tensors in a list.
            data = tree_map_only(
                CudaTensor, lambda t: t.item() if t.dim() == 0 else t.tolist(), data
            )
        if device is None or torch.device(device).type != "cuda":
            options = {} if device is None else {"device": device}
            if requires_grad:
                options["requires_grad"] = True
            return make(data, *args, **options, **kwargs)
        if isinstance(data, torch.Tensor) and on_cuda(data):
            return data
        return make(data, *args, **kwargs).to("cuda").requires_grad_(requires_grad)

    return made


def _set_data(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """A tensor of the CPU that gets memory of the GPU becomes one of the GPU."""
    if not isinstance(other, CudaTensor) or isinstance(tensor, CudaTensor):
        _DATA.__set__(tensor, other)
        return
    there = CudaTensor(inner(other)).requires_grad_(tensor.requires_grad)
    torch.utils.swap_tensors(tensor, there)


def _new_bias(cls: type[CausalBias], *args: Any) -> CausalBias:
    """torch can't create this subclass inside a dispatch mode."""
    with _disable_current_modes():
        return torch.Tensor.__new__(cls)


def _rms_norm(
    x: torch.Tensor, shape: list[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """As on CUDA: one kernel."""
    if weight is None or weight.dim() > 1 or not on_cuda(x):
        return _RMS_NORM(x, shape, weight, eps)
    return FusedRMSNorm.apply(x, weight, torch.finfo(x.dtype).eps if eps is None else eps)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As on CUDA: the flash kernel if it can, otherwise written out."""
    if not on_cuda(query):
        return _SDPA(
            *(query, key, value, attn_mask, dropout_p, is_causal),
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if not on_cuda(key) or not on_cuda(value):
        raise MixedDevices("attention")
    is_causal = is_causal or isinstance(attn_mask, CausalBias)
    is_masked = attn_mask is not None and not isinstance(attn_mask, CausalBias)
    width = query.shape[-1]
    if not is_masked and query.dtype != torch.float32 and width % 8 == 0 and width <= 256:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    if is_causal:
        rows, columns = scores.shape[-2:]
        attn_mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        attn_mask = attn_mask.tril(columns - rows)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    return torch.softmax(scores, -1) @ value


# ------------------------------------------------------------------ ranks


def _init_process_group(backend: str | None = None, **kwargs: Any) -> None:
    """Without NCCL, tensors on GPUs are sent by gloo, as those on CPUs are."""
    if backend is not None and "nccl" in backend:
        backend = "gloo"
    _INIT_PROCESS_GROUP(backend, **kwargs)


def _batch_isend_irecv(operations: list[dist.P2POp]) -> list[Any]:
    requests = []
    for operation in operations:
        COUNTS.collectives[f"{operation.op.__name__} {place()}"] += 1
        requests.append(operation.op(inner(operation.tensor), operation.peer, operation.group))
    return requests
