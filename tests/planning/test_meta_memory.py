"""What operators take on tensors without memory does not depend on how often they ran before."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nemo_care.planning.meta_memory import MetaMemory

COUNT = 64


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def backward(hidden: torch.Tensor) -> torch.Tensor:
    weight = tensor(16, 8).requires_grad_()
    out = checkpoint(
        lambda x: torch.nn.functional.silu(x @ weight.t()), hidden, use_reentrant=False
    )
    out.sum().backward()
    assert weight.grad is not None
    return weight.grad


OPERATORS = {
    "a product": lambda x: x @ tensor(8, 4),
    "of a transposed matrix": lambda x: x.t() * 2,
    "by an integer": lambda x: tensor(COUNT, 8, dtype=torch.int32) * 1,
    "by a real number": lambda x: tensor(COUNT, 8, dtype=torch.int32) * 1.0,
    "by a truth value": lambda x: tensor(COUNT, 8, dtype=torch.int32) * True,
    "several results": lambda x: torch.topk(x, 2)[1],
    "another type": lambda x: x.float(),
    "the same type": lambda x: x.to(torch.bfloat16),
    "a view": lambda x: x.view(-1, 4)[3:],
    "parts": lambda x: x.split(16)[1],
    "in place": lambda x: x.mul_(2).add_(x, alpha=2),
    "a list in place": lambda x: torch._foreach_mul_([x, x], 2.0),
    "many of a list": lambda x: torch._foreach_add([x, x.float()], 1.0)[1],
    "into a given tensor": lambda x: torch.add(x, x, out=tensor(COUNT, 8)),
    "with tensors of the CPU": lambda x: x.index_select(0, torch.tensor([1, 2])),
    "forward and backward": backward,
}  # fmt: skip


def taken(memory: MetaMemory, operator) -> tuple:
    """Bytes at the peak and after it, and the result's layout, type and share of its argument."""
    argument = tensor(COUNT, 8)
    before = memory.current
    memory.reset_peak()
    result = operator(argument)
    found: tuple = (memory.peak - before, memory.current - before)
    storage = argument.untyped_storage()._cdata
    for one in result if isinstance(result, list) else [result]:
        shared = one.untyped_storage()._cdata == storage
        found += (one.shape, one.stride(), one.dtype, shared)
    return found


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_takes_the_same_each_time(name):
    with MetaMemory() as memory:
        # Others with arguments that are equal, but of other types.
        for operator in OPERATORS.values():
            taken(memory, operator)
        again = taken(memory, OPERATORS[name])
        assert memory.current == 0
    with MetaMemory() as memory:
        assert again == taken(memory, OPERATORS[name])


def test_an_operator_is_refused_for_the_same_arguments_each_time():
    with MetaMemory():
        for _ in range(2):
            with pytest.raises(RuntimeError):
                tensor(2, 3) @ tensor(2, 3)
