"""Check whether a rank's gradients are finite, before they are summed with other ranks'."""

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

# Elements that are checked at a time: CUDA's kernel of aminmax counts them in 32 bits.
_PIECE = 2**30


class GradientWatch:
    """Checks the gradients of this rank's own backward before they are summed.

    Afterwards a NaN of one rank is also in other ranks' sums. Megatron's own check raises in the
    middle of backward, on one rank, while the other ranks wait for it.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        """Check every backward of `model` from now on."""
        self.model = model
        self.finite = torch.tensor(True)
        finalize = model.config.finalize_model_grads_func

        def look_first(*arguments: Any, **keywords: Any) -> None:
            self.look()
            finalize(*arguments, **keywords)

        model.config.finalize_model_grads_func = look_first

    def look(self) -> None:
        """Set `finite` (bool, on the gradients' device; nothing is read back from a GPU)."""
        parts = [_is_finite(buffer) for buffer in self._buffers()]
        self.finite = torch.stack(parts).all() if parts else torch.tensor(True)

    def _buffers(self) -> Iterator[torch.Tensor]:
        for buffer in (*self.model.buffers, *self.model.expert_parallel_buffers):
            if buffer.grad_data.numel():
                yield buffer.grad_data

    def parameters_not_finite(self) -> list[str]:
        """Return the names of the parameters whose current gradient has a NaN or an infinity."""
        names = []
        for name, parameter in self.model.module.named_parameters():
            gradient = getattr(parameter, "main_grad", None)
            if gradient is not None and not _is_finite(gradient):
                names.append(name)
        return names


def _is_finite(values: torch.Tensor) -> torch.Tensor:
    # aminmax propagates a NaN, and needs no tensor of the values' size, unlike isfinite.
    ends = [end for piece in values.flatten().split(_PIECE) for end in torch.aminmax(piece)]
    return torch.stack(ends).isfinite().all()
