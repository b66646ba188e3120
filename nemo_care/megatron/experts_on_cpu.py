"""Let Megatron send tokens to experts on a machine without CUDA (see `cpu.py`)."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from megatron.core.transformer.moe import moe_utils, token_dispatcher


class _NoStream:
    """A CUDA stream or event where everything is computed at once.

    A class, because libraries name `torch.cuda.Stream` in their annotations.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: "_NoStream") -> None:
        pass

    def record_event(self) -> "_NoStream":
        return self

    def synchronize(self) -> None:
        pass


_gather, _reduce_scatter = (
    mappings._gather_along_first_dim,
    mappings._reduce_scatter_along_first_dim,
)


def route_without_cuda() -> None:
    """Replace what Megatron's token dispatcher requires of CUDA and NCCL."""
    # It copies the counts of tokens to the CPU on a stream of their own.
    torch.cuda.Stream = _NoStream  # type: ignore[assignment,misc]
    torch.cuda.current_stream = _NoStream  # type: ignore[assignment]
    torch.cuda.stream = lambda *args, **kwargs: nullcontext()  # type: ignore[assignment]
    token_dispatcher.maybe_move_tensor_to_cpu = _counts
    # TransformerEngine's product, which computes on CUDA.
    moe_utils.te_general_gemm = None
    mappings._gather_along_first_dim = _gather_any_lengths
    mappings._reduce_scatter_along_first_dim = _reduce_scatter_any_lengths


def _counts(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _gather_any_lengths(
    input_: torch.Tensor,
    group: dist.ProcessGroup,
    output_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """As Megatron's; gloo gathers tensors of one shape only."""
    if output_split_sizes is None or group.size() == 1:
        return _gather(input_, group, output_split_sizes, use_global_buffer)
    missing = max(output_split_sizes) - len(input_)
    padded = F.pad(input_, (0, 0) * (input_.dim() - 1) + (0, missing))
    parts = [torch.empty_like(padded) for _ in output_split_sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([p[:size] for p, size in zip(parts, output_split_sizes, strict=True)])


def _reduce_scatter_any_lengths(
    input_: torch.Tensor,
    group: dist.ProcessGroup,
    input_split_sizes: list[int] | None = None,
    use_global_buffer: bool = False,
) -> torch.Tensor:
    """As Megatron's; gloo scatters tensors of one shape only."""
    if input_split_sizes is None or group.size() == 1:
        return _reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
    total = input_.clone()
    dist.all_reduce(total, group=group)
    return total.split(input_split_sizes)[group.rank()].contiguous()
