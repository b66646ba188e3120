"""CPU memory that a GPU can copy to and from asynchronously."""

from collections.abc import Sequence

import torch

# Memory registered with CUDA stays registered when it is freed, and a later allocation at the same
# address could not be registered. It is therefore never freed.
_registered: list[torch.Tensor] = []


def host_empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in CPU memory, pinned if there is a GPU; it lives as long as the process."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device="cpu")
    if torch.cuda.is_available() and tensor.nbytes:
        # Not pin_memory(): torch's allocator rounds every tensor up to a power of two.
        status = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
        torch.cuda.check_error(int(status))
        _registered.append(tensor)
    return tensor
