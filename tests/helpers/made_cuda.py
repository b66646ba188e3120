"""What of CUDA can be had on a CPU: tensors without values, and a product that only CUDA has."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from nemo_care.models import log_probs

CUDA_PRODUCT = torch.ops.aten.mm.dtype


@contextmanager
def with_cuda_products() -> Iterator[None]:
    """Let the CPU compute CUDA's float32 product of bf16 matrices, and have it used."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype", lambda left, right, dtype: left.to(dtype) @ right.to(dtype), "CPU")
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(log_probs, "_sums_in_float32", lambda x: x.dtype != torch.float32)
            yield
    finally:
        library._destroy()


def without_values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a CUDA tensor without values, inside a FakeTensorMode."""
    # The operator itself: `enable_cpu_megatron` may have replaced torch.empty in this process.
    return torch.ops.aten.empty.memory_format(shape, dtype=dtype, device="cuda")
