"""Let megatron-core 0.16.1 run on a machine without CUDA.

Megatron Core requests CUDA devices by name in a few dozen places. On a machine without CUDA,
`enable_cpu_megatron()` redirects those requests to another device: "cpu", which computes, or
"meta", which only tracks shapes. With CUDA the call does nothing, so this module does not affect
the GPU path.

megatron-core's version is pinned in pyproject.toml because of these replacements.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_active: "_DeviceRedirect | None" = None


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


# Functions that request or report a device without a keyword.
_BY_ARGUMENT = frozenset({torch.Tensor.cuda, torch.Tensor.to, torch.Tensor.type})


class _DeviceRedirect(TorchFunctionMode):
    """Redirects every tensor for CUDA to `device`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Every operation passes through here, so those without a device return at once.
        if kwargs:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = self.device
        elif func not in _BY_ARGUMENT:
            return func(*args)
        else:
            kwargs = {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to:
            args = tuple(self.device if _is_cuda(a) else a for a in args)
        result = func(*args, **kwargs)
        # The distributed optimizer sorts parameters by these type names and accepts only CUDA's.
        if (
            func is torch.Tensor.type
            and isinstance(result, str)
            and not result.startswith("torch.cuda.")
        ):
            return f"torch.cuda.{result.rpartition('.')[2]}"
        return result


def enable_cpu_megatron(device: str = "cpu") -> bool:
    """Redirect Megatron Core's CUDA requests to `device` ("cpu" or "meta") for this process.

    Returns:
        True if the redirect is active, False if CUDA is present and nothing was done.
    """
    global _active
    if torch.cuda.is_available():
        return False
    target = torch.device(device)
    if _active is not None:
        _active.device = target
        return True

    # The functions are replaced before the mode is entered: they must see the real generator.
    def current_device() -> torch.device:
        return _active.device if _active is not None else target

    torch.cuda.current_device = current_device  # type: ignore[assignment]
    torch.cuda.set_device = lambda *args, **kwargs: None
    torch.cuda.synchronize = lambda *args, **kwargs: None

    from megatron.core.tensor_parallel import random as megatron_random

    # Recomputation saves and restores the generator of the compute device.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    from nemo_care.megatron.experts_on_cpu import route_without_cuda

    route_without_cuda()
    _take_torch_optimizers()
    _active = _DeviceRedirect(target)
    _active.__enter__()
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
