"""Let megatron-core 0.16.1 run on a machine without CUDA.

Megatron Core requests CUDA devices by name in a few dozen places. On a machine without CUDA,
`enable_cpu_megatron()` redirects those requests to another device: "cpu", which computes, or
"meta", which only tracks shapes. With CUDA the call does nothing, so this module does not affect
the GPU path.

megatron-core's version is pinned in pyproject.toml because of these replacements.
"""

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils._device import _device_constructors

# Where requests for CUDA go; None until `enable_cpu_megatron` is called.
_target: torch.device | None = None

# Methods with a `device` keyword, beside the functions that torch itself lists.
_LIKE = ("empty", "full", "ones", "rand", "randint", "randn", "zeros")
_NEW = ("empty", "empty_strided", "full", "ones", "tensor", "zeros")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _redirected(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that takes a CUDA device for the target."""

    @wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = _target
        return make(*args, **kwargs)

    return made


def _redirect() -> None:
    """Replace every function of torch that takes a device.

    A TorchFunctionMode would need one method only, but would see each operation: 2 microseconds.
    """
    # `with torch.device(...)` keeps this list from its first use on, and must know the true ones.
    for make in _device_constructors():
        name = make.__name__
        if getattr(torch, name, None) is make:
            setattr(torch, name, _redirected(make))  # type: ignore[arg-type]
    for name in _LIKE:
        setattr(torch, f"{name}_like", _redirected(getattr(torch, f"{name}_like")))
    for name in _NEW:
        setattr(torch.Tensor, f"new_{name}", _redirected(getattr(torch.Tensor, f"new_{name}")))
    move, type_of = torch.Tensor.to, torch.Tensor.type

    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_target, *args[1:])
        elif kwargs and _is_cuda(kwargs.get("device")):
            kwargs["device"] = _target
        return move(tensor, *args, **kwargs)

    def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_of(tensor, *args, **kwargs)
        # The distributed optimizer sorts parameters by these names and accepts only CUDA's.
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return f"torch.cuda.{result.rpartition('.')[2]}"
        return result

    torch.Tensor.to = to  # type: ignore[method-assign,assignment]
    torch.Tensor.type = type_  # type: ignore[assignment,method-assign]
    torch.Tensor.cuda = lambda tensor, *args, **kwargs: tensor  # type: ignore[method-assign]


def enable_cpu_megatron(device: str = "cpu") -> bool:
    """Redirect Megatron Core's CUDA requests to `device` ("cpu" or "meta") for this process.

    Returns:
        True if the redirect is active, False if CUDA is present and nothing was done.
    """
    global _target
    if torch.cuda.is_available():
        return False
    is_active, _target = _target is not None, torch.device(device)
    if is_active:
        return True

    torch.cuda.current_device = lambda: _target  # type: ignore[assignment,return-value]
    torch.cuda.set_device = lambda *args, **kwargs: None
    torch.cuda.synchronize = lambda *args, **kwargs: None

    from megatron.core.tensor_parallel import random as megatron_random

    # Recomputation saves and restores the generator of the compute device.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    from nemo_care.megatron.experts_on_cpu import route_without_cuda

    route_without_cuda()
    _take_torch_optimizers()
    _redirect()
    return True


def _take_torch_optimizers() -> None:
    """Make Megatron use torch's optimizer and norm instead of TransformerEngine's or apex's.

    If one of them is installed but CUDA is hidden, as for a plan on a machine with GPUs, Megatron
    would call CUDA kernels with tensors on the CPU or on `meta`.
    """
    if all(find_spec(name) is None for name in ("transformer_engine", "apex")):
        return
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer
    from megatron.core.optimizer import optimizer as mixed_precision

    optimizer.Adam, optimizer.SGD = torch.optim.AdamW, torch.optim.SGD
    optimizer.USING_PYTORCH_OPTIMIZER = True
    distrib_optimizer.Adam = torch.optim.Adam
    distrib_optimizer.HAVE_APEX_OR_TE = False
    distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.USING_APEX_OPTIMIZER = False
    for module in (clip_grads, mixed_precision):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm


def compute_device() -> torch.device:
    """Return the device of models: this rank's GPU, or the CPU if there is none."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
