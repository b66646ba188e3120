"""Gradients of which each tensor-parallel rank has computed a part: summed with the others.

Megatron sums those of parameters that sequence parallelism has marked, and averages others (with
NCCL only); its marks do not fit parameters whose part does not depend on sequence parallelism.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads

_MARK = "gradient_is_partial"


def mark_partial_gradient(parameter: torch.nn.Parameter) -> None:
    """From now on `finalize_gradients` sums this parameter's gradient over the ranks."""
    setattr(parameter, _MARK, True)


def finalize_gradients(models: Sequence[torch.nn.Module], *arguments: Any, **keywords: Any) -> None:
    """Megatron's `finalize_model_grads`, and the sums of the gradients that are marked.

    After the sum over the replicas, each rank's part of a gradient for the distributed optimizer is
    summed with the same part of the other tensor-parallel ranks.
    """
    finalize_model_grads(models, *arguments, **keywords)
    group = parallel_state.get_tensor_model_parallel_group()
    works = [
        dist.all_reduce(parameter.main_grad, group=group, async_op=True)  # type: ignore[attr-defined]
        for model in models
        for parameter in model.parameters()
        if parameter.requires_grad and getattr(parameter, _MARK, False)
    ]
    for work in works:
        work.wait()
