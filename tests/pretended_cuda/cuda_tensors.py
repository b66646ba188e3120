"""Tensors that are on the pretended device, and how operators run on them."""

from typing import Any

import torch
from cuda_counts import COUNTS, place
from cuda_graphs import CUDAGraph
from cuda_kernels import KERNELS
from cuda_rules import (
    CPU,
    CUDA,
    MixedDevices,
    check,
    note,
    on_cuda,
    result_device,
    tensors,
    written,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_NAMES = {
    torch.float32: "torch.cuda.FloatTensor",
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
}
_TYPE = torch.Tensor.type


class CudaTensor(torch.Tensor):
    """A tensor on cuda:0; `inner` has its values, in CPU memory."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "CudaTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self, **unused):
        return f"CudaTensor({self.inner!r}, grad_fn={self.grad_fn})"

    def data_ptr(self):
        return self.inner.data_ptr()

    def untyped_storage(self):
        return self.inner.untyped_storage()

    # A parameter can get other memory, on the CPU too (offloading), and then says where it is.
    @property
    def data(self):
        return torch._C.TensorBase.data.__get__(self)

    @data.setter
    def data(self, other):
        torch._C.TensorBase.data.__set__(self, other)
        self.inner = inner(other)

    def numpy(self, *args, **kwargs):
        if on_cuda(self):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        return self.inner.numpy(*args, **kwargs)

    def tolist(self):
        if on_cuda(self):
            COUNTS.waits[f"tolist {place()}"] += 1
        return self.inner.tolist()

    def type(self, dtype=None, *args, **kwargs):
        if dtype is None:
            return _NAMES.get(self.dtype, str(self.dtype))
        return _TYPE(self, dtype, *args, **kwargs)

    def new_tensor(self, data, *, dtype=None, device=None):
        # As `torch.tensor`, which is replaced, it copies where no dispatcher sees it.
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def is_pinned(self, *args):
        return not on_cuda(self) and self.inner.is_pinned()

    def __reduce_ex__(self, protocol):
        if on_cuda(self):
            raise MixedDevices("a CUDA tensor is pickled: sent as an object, or stored")
        return self.inner.__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copied = CudaTensor(self.inner.detach().clone()).requires_grad_(self.requires_grad)
        attributes = {name: value for name, value in self.__dict__.items() if name != "inner"}
        copied.__dict__.update(attributes)
        memo[id(self)] = copied
        return copied


def inner(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor in CPU memory."""
    return tensor.inner if isinstance(tensor, CudaTensor) else tensor


class CudaMode(TorchDispatchMode):
    """Sees operators without a tensor on the device: those that make one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = list(tensors((*args, *kwargs.values())))
        if result_device(args, kwargs).type == "cuda" or any(
            isinstance(t, CudaTensor) for t in given
        ):
            return run(func, args, kwargs)
        return func(*args, **_without_pinning(kwargs))


def _without_pinning(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "pin_memory": False} if kwargs.get("pin_memory") else kwargs


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Check devices, count, compute on the CPU, and put the results where they belong."""
    is_collective = func.namespace == "c10d"
    if not is_collective:
        check(func, args, kwargs)
    device = result_device(args, kwargs)
    if device.type == "cuda" or any(map(on_cuda, tensors((*args, *kwargs.values())))):
        note(func, args, kwargs, device)
        if CUDAGraph.capturing is not None:
            CUDAGraph.capturing.check()
    inner_args, inner_kwargs = tree_map_only(torch.Tensor, inner, (args, kwargs))
    inner_kwargs = _without_pinning(inner_kwargs)
    if inner_kwargs.get("device") is not None:
        inner_kwargs["device"] = CPU
    compute = KERNELS.get(func, func)
    if CUDAGraph.capturing is not None and device.type == "cuda":
        out = CUDAGraph.capturing.record(func, compute, inner_args, inner_kwargs)
    else:
        out = compute(*inner_args, **inner_kwargs)
    if is_collective:
        return _collected(args, out)
    return _on_device(func, args, kwargs, out, device)


def _on_device(func: Any, args: tuple, kwargs: dict, out: Any, device: torch.device) -> Any:
    """Wrap the results; what was written in place is the argument itself."""
    same = {}
    for declared, value in written(func, args, kwargs):
        for tensor in tensors([value]):
            if isinstance(tensor, CudaTensor) and tensor.shape != tensor.inner.shape:
                raise NotImplementedError(f"{func} has changed a shape in place")
        same[frozenset(declared.alias_info.after_set)] = value

    def wrap(value: Any, declared: Any = None) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(wrap(item) for item in value)
        if not isinstance(value, torch.Tensor) or isinstance(value, CudaTensor):
            return value
        if declared is not None and declared.alias_info is not None:
            argument = same.get(frozenset(declared.alias_info.after_set))
            if argument is not None and declared.alias_info.is_write:
                return argument
        return CudaTensor(value) if device.type == "cuda" else value

    returns = func._schema.returns
    if isinstance(out, list | tuple) and len(returns) > 1:
        return type(out)(wrap(*pair) for pair in zip(out, returns, strict=True))
    return wrap(out, returns[0] if returns else None)


def _collected(args: tuple, out: Any) -> Any:
    """Give back a collective's results, which are its arguments, written in place."""
    if not isinstance(out, tuple):
        return out
    argument = {id(t.inner): t for t in tensors(args) if isinstance(t, CudaTensor)}
    return tree_map_only(torch.Tensor, lambda t: argument.get(id(t), t), out)
