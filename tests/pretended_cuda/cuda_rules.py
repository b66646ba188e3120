"""CUDA's rules about devices, and what counts as a kernel or a wait, by operator."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from cuda_counts import COUNTS, place

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")

_COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
_INDEXING = {
    *(aten.index.Tensor, aten._unsafe_index.Tensor),
    *(aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default),
}
# Operators that are not marked as pointwise, and take numbers from the CPU all the same.
_TAKE_NUMBERS = {"fill_", "masked_fill", "masked_fill_", "where", "lerp", "lerp_"}
# The shape of the result, or the result itself on the CPU, depends on values.
_WAIT = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim"),
    *("unique_consecutive", "equal", "is_nonzero", "bincount"),
}
# Memory without values, other names for the same memory, and questions.
_NO_KERNEL = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_", "set_"),
    *("detach", "lift", "alias", "_unsafe_view", "_reshape_alias", "_local_scalar_dense"),
    *("is_same_size", "is_pinned", "record_stream"),
}
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot"}


class MixedDevices(RuntimeError):
    """An operator got tensors of CPU and GPU that CUDA's would refuse."""


class Capturing(RuntimeError):
    """A graph cannot capture this: CUDA refuses it, or it would happen only once."""


def tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among an operator's arguments."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)


def on_cuda(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def name_of(func: Any) -> str:
    """Return an operator's name without its namespace."""
    return func._schema.name.split("::")[1]


def written(func: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the arguments that the operator writes to, each after its declaration."""
    for number, declared in enumerate(func._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            yield declared, args[number] if number < len(args) else kwargs.get(declared.name)


def result_device(args: tuple, kwargs: dict[str, Any]) -> torch.device:
    """Return where an operator puts its results."""
    asked = kwargs.get("device")
    if asked is not None:
        return torch.device(asked)
    return CUDA if any(map(on_cuda, tensors((*args, *kwargs.values())))) else CPU


def check(func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse tensors of two devices as CUDA's operators do.

    Raises:
        MixedDevices: with the operator, devices and shapes.
    """
    given = list(tensors((*args, *kwargs.values())))
    if func in _COPIES or len({t.device.type for t in given}) < 2:
        return
    strangers = [t for t in given if not on_cuda(t)]
    if func in _INDEXING:
        # Indices may be on the CPU; they are copied.
        values = [t for t in args[2:3] if isinstance(t, torch.Tensor) and t.dim()]
        allowed = all(map(on_cuda, (args[0], *values)))
    else:
        # A tensor without dimensions on the CPU is a number, but nothing on the CPU is written.
        outputs = tensors(value for _, value in written(func, args, kwargs))
        name = name_of(func)
        takes_numbers = name in _TAKE_NUMBERS or name.startswith("_foreach")
        allowed = (
            (takes_numbers or torch.Tag.pointwise in func.tags)
            and all(t.dim() == 0 for t in strangers)
            and all(map(on_cuda, outputs))
        )
    if not allowed:
        places = ", ".join(f"{t.device}{tuple(t.shape)}" for t in given)
        raise MixedDevices(f"{func}: {places}")


def note(func: Any, args: tuple, kwargs: dict[str, Any], device: torch.device) -> None:
    """Count an operator that involves the device."""
    name = name_of(func)
    if func.namespace == "c10d":
        COUNTS.collectives[f"{name} {place()}"] += 1
        return
    given = list(tensors((*args, *kwargs.values())))
    if not func.is_view and name not in _NO_KERNEL:
        COUNTS.kernels[name] += 1
    if name in _PRODUCTS and all(t.dtype == torch.float32 for t in given):
        COUNTS.float32_products[f"{name} {place()}"] += 1
    if _waits(func, args, kwargs, given, device):
        COUNTS.waits[f"{name} {place()}"] += 1
    if _uploads(func, args, device):
        COUNTS.uploads[f"{name} {place()}"] += 1


def _waits(
    func: Any, args: tuple, kwargs: dict[str, Any], given: list[torch.Tensor], device: torch.device
) -> bool:
    if name_of(func) in _WAIT or func is aten.repeat_interleave.Tensor:
        return any(map(on_cuda, given))
    if func in _INDEXING:
        # The places of a mask are counted, unless they all get one number (masked_fill_).
        is_mask = any(t.dtype in (torch.bool, torch.uint8) for t in tensors([args[1]]))
        filled = [t for t in args[2:3] if isinstance(t, torch.Tensor) and not on_cuda(t)]
        return is_mask and not any(t.numel() == 1 for t in filled)
    if func is aten._to_copy.default:
        return on_cuda(args[0]) and device == CPU and not kwargs.get("non_blocking")
    if func is aten.copy_.default:
        asynchronous = kwargs.get("non_blocking") or args[2:3] == (True,)
        return on_cuda(args[1]) and not on_cuda(args[0]) and not asynchronous
    return False


def _uploads(func: Any, args: tuple, device: torch.device) -> bool:
    if func in _INDEXING:
        return any(not on_cuda(index) for index in tensors([args[1]]))
    if func is aten._to_copy.default:
        return device.type == "cuda" and _pageable(args[0])
    if func is aten.copy_.default:
        return on_cuda(args[0]) and _pageable(args[1])
    if func is aten._foreach_copy_.default:
        pairs = zip(args[0], args[1], strict=True)
        return any(on_cuda(to) and _pageable(source) for to, source in pairs)
    return False


def _pageable(tensor: torch.Tensor) -> bool:
    return not on_cuda(tensor) and not tensor.is_pinned()
