"""CPU memory that a GPU copies to and from by itself."""

from collections.abc import Sequence

import torch

# What CUDA has been told of stays told of when it is freed, and an allocation that malloc then puts
# there can't be registered. So nothing of it is freed.
_registered: list[torch.Tensor] = []


def host_empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor in CPU memory, pinned where there is a GPU; for as long as the process lives."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    if torch.cuda.is_available() and tensor.nbytes:
        # Not pin_memory(): torch's allocator rounds every tensor up to a power of two.
        status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        torch.cuda.check_error(int(status))
        _registered.append(tensor)
    return tensor
