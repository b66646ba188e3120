"""CPU memory that a GPU copies to and from: what CUDA is told of, with CUDA's part made up."""

import torch
from made_cuda import without_values
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_care.checkpoints.writer import _copied
from nemo_care.megatron import host_memory


class MadeCuda:
    """Registers memory like CUDA: what is told of stays told of when it is freed."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        end = start + size
        assert all(end <= first or start >= last for first, last in self.ranges), "registered twice"
        self.ranges.append((start, end))
        return 0


def test_memory_that_was_let_go_is_not_registered_again(monkeypatch):
    cuda = MadeCuda()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "check_error", lambda status: None)
    monkeypatch.setattr(host_memory, "_registered", [])
    for _ in range(20):
        host_memory.host_empty((64,), torch.float32)
        host_memory.host_empty((2**18,), torch.float32)
    assert len(cuda.ranges) == 40


class _Keywords(TorchDispatchMode):
    """The keywords of every operator that is called."""

    def __init__(self):
        super().__init__()
        self.all = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all.append(dict(kwargs or {}))
        return func(*args, **(kwargs or {}))


def test_copies_for_a_checkpoint_take_no_memory_of_the_pinned_allocator():
    """Asynchronous copies to the CPU do. Tensors without values, since there is no GPU."""
    with FakeTensorMode():
        tensor = without_values(5)
        with _Keywords() as keywords:
            copy = _copied(tensor, is_own=False)
    assert copy.device.type == "cpu"
    assert any("device" in each for each in keywords.all)
    assert not any(each.get("non_blocking") or each.get("pin_memory") for each in keywords.all)
