"""Run real code on tensors without memory, and count the memory it would have taken.

Inside `MetaMemory` everything with a hidden dimension is on `meta`. Tensors that determine shapes
(token ids, positions, masks, grids) are small and remain real CPU tensors, so nothing depends on
missing values. Every storage that an operator creates is counted until it is freed, as in
`torch.cuda.memory_allocated`, so peaks include temporaries inside an operator's caller.

torch's own `MemTracker` counts in the same way, but does not mix devices or distinguish host from
device memory, and its hooks on every module take minutes at these sizes.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import CausalBias
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from nemo_care.megatron import host_memory

aten = torch.ops.aten
_FACTORIES = {aten.empty.memory_format, aten.zeros.default, aten.ones.default}
# Bytes. Larger CPU tensors do not determine shapes: they get no memory.
_LARGE = 2**20


class MetaMemory(TorchDispatchMode):
    """Counts bytes on the (imagined) device and in host memory.

    `current` and `peak` are device bytes, `host` the bytes of large tensors that the code places in
    CPU memory. A value that the code reads back is 1 (False for a truth value).
    """

    def __init__(self) -> None:
        """Start with empty counters."""
        super().__init__()
        self.current = 0
        self.peak = 0
        self.host = 0
        self._alive: dict[int, Any] = {}
        self._replaced = ExitStack()

    def __enter__(self) -> "MetaMemory":
        """Start counting."""
        # Plain replacements, since recomputation inside backward is not seen by function modes.
        self._replaced.enter_context(patch.object(F, _ATTENTION.__name__, _attention))
        self._replaced.enter_context(patch.object(torch, "tensor", _reading_back(torch.tensor)))
        self._replaced.enter_context(patch.object(host_memory, "host_empty", self._host_empty))
        self._replaced.enter_context(
            patch.object(CausalBias, "__new__", _new_outside_modes, create=True)
        )
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Stop counting; memory that is freed later is still subtracted."""
        super().__exit__(*error)
        self._replaced.close()

    def reset_peak(self) -> None:
        """Reset the peak to the current bytes."""
        self.peak = self.current

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        if func in _FACTORIES:
            return self._make(func, args, kwargs)
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        if not any(tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return _read_back(tensors[0])
        if func is aten._to_copy.default and _is_cpu(kwargs.get("device")):
            kwargs = {**kwargs, "device": torch.device("meta")}
            if tensors[0].numel() * tensors[0].element_size() <= _LARGE:
                return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
            return self._count(func(*args, **kwargs), host=True)
        if not all(tensor.is_meta for tensor in tensors):
            args, kwargs = tree_map_only(torch.Tensor, _lifted, (args, kwargs))
        result = func(*args, **kwargs)
        self._note_workspace(func, args)
        return self._count(result)

    def _make(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """Create a tensor; a large CPU tensor gets no memory."""
        host = _is_cpu(kwargs.get("device")) or kwargs.get("device") is None
        if host:
            width = (kwargs.get("dtype") or torch.get_default_dtype()).itemsize
            if torch.Size(args[0]).numel() * width <= _LARGE:
                return func(*args, **kwargs)
            kwargs = {**kwargs, "device": torch.device("meta"), "pin_memory": False}
        return self._count(func(*args, **kwargs), host=host)

    def _host_empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Create a tensor that the code moves to CPU memory on purpose, however small it is."""
        with _disable_current_modes():
            made = torch.empty(tuple(shape), dtype=dtype, device="meta")
        return self._count(made, host=True)

    def _count(self, result: Any, *, host: bool = False) -> Any:
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(tensor, torch.Tensor) or not tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._alive or not size:
                continue
            # torch keeps a storage's Python object as long as the storage itself.
            self._alive[key] = weakref.ref(storage, self._freer(key, size, host))
            if host:
                self.host += size
            else:
                self.current += size
                self.peak = max(self.peak, self.current)
        return result

    def _freer(self, key: int, size: int, host: bool) -> Any:
        def free(_: Any) -> None:
            del self._alive[key]
            if host:
                self.host -= size
            else:
                self.current -= size

        return free

    def _note_workspace(self, func: Any, args: tuple) -> None:
        """Count the workspace of CUDA's kernels, which `meta` does not show."""
        if func is aten._scaled_dot_product_flash_attention_backward.default:
            # FlashAttention 2 sums dq in float32 and, with fewer key heads than query heads, keeps
            # dk and dv per query head (torch's flash_api.cpp, mha_bwd).
            _, query, key, value, *_ = args
            workspace = query.numel() * 4
            if query.shape[1] != key.shape[1]:
                times = query.shape[1] // key.shape[1]
                workspace += (key.nbytes + value.nbytes) * times
        elif func is aten.masked_scatter.default:
            # A prefix sum over the mask in int64 (torch's IndexKernel.cpp).
            workspace = args[0].numel() * 8
        elif func is aten.logsumexp.default:
            # The exponentials (torch's ReduceOps.cpp).
            workspace = args[0].nbytes
        else:
            return
        self.peak = max(self.peak, self.current + workspace)


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among an operator's arguments; torch's own tree walk is much slower."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _lifted(tensor: torch.Tensor) -> torch.Tensor:
    """Return a `meta` tensor with the shape of a CPU tensor."""
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _read_back(tensor: torch.Tensor) -> bool | int | float:
    if tensor.dtype == torch.bool:
        return False
    return 1.0 if tensor.is_floating_point() else 1


def _new_outside_modes(cls: type[CausalBias], *args: Any) -> CausalBias:
    """Create the object outside of dispatch modes, where torch can't create this subclass."""
    with _disable_current_modes():
        return torch.Tensor.__new__(cls)


_ATTENTION = F.scaled_dot_product_attention


def _attention(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Use, on `meta`, the attention that torch chooses on a GPU in bf16: the flash kernel."""
    return (flash_attention if query.is_meta else _ATTENTION)(query, *args, **kwargs)


def _reading_back(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `torch.tensor`, which reads the values of tensors in a list, for those on `meta`."""

    def made(data: Any, **kwargs: Any) -> torch.Tensor:
        values = tree_map_only(torch.Tensor, lambda t: _read_back(t) if t.is_meta else t, data)
        return make(values, **kwargs)

    return made


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute `F.scaled_dot_product_attention` by the flash kernel (causal masks only)."""
    causal = is_causal or isinstance(attn_mask, CausalBias)
    return aten._scaled_dot_product_flash_attention(
        query, key, value, dropout_p, causal, False, scale=scale
    )[0]
