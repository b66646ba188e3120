"""Ranks that share the experts of one model."""

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils


def is_distributed_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is of experts that are distributed over ranks, by Megatron's mark."""
    return not getattr(parameter, "allreduce", True)


def route_without_transformer_engine() -> None:
    """Define what megatron-core 0.16.1's router looks for, a name that only TransformerEngine
    gives: without its product it takes torch's."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def most_in_step(count: int) -> int:
    """Return the largest `count` of the model replicas that share experts with this one.

    Collective over them; each layer's tokens travel between these replicas, so all of them have to
    run the same number of passes.
    """
    group = parallel_state.get_expert_tensor_and_model_parallel_group()
    if group.size() <= parallel_state.get_tensor_model_parallel_world_size():
        return count
    most = torch.tensor(count, device="cpu")
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    return int(most)
