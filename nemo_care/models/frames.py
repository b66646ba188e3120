"""From frames in the memory of a replica's leader to patches on the GPUs of its first stage.

Only the leader holds frames, so a replica's memory for them depends on neither its tensor- nor its
pipeline-parallel size. The other tensor-parallel ranks of the first stage get those of a
micro-batch when it is computed: one broadcast of uint8, from GPU to GPU.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from nemo_care.data.patches import Patching


def patches_on_device(
    prompts: Sequence[Sequence[torch.Tensor]], patching: Patching
) -> list[torch.Tensor]:
    """Patches float32 [patches of the prompt, values] of each prompt, on the compute device.

    Args:
        prompts: frames uint8 [count, H, W, 3] of each prompt's videos and images, at least one;
            the values count on the leader alone.
        patching: the family's.

    All tensor-parallel ranks of the first stage call it alike.
    """
    frames = iter(_on_device([item for prompt in prompts for item in prompt]))
    cut = [[patching.patches(next(frames)) for _ in prompt] for prompt in prompts]
    return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in cut]


def _on_device(frames: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The leader's frames, on the compute device of each tensor-parallel rank."""
    # In a dry run this is the device of shapes.
    device = torch.cuda.current_device()
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return [item.to(device) for item in frames]
    sizes = [item.numel() for item in frames]
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        flat = torch.cat([item.reshape(-1) for item in frames]).to(device)
    else:
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    dist.broadcast(
        flat,
        src=parallel_state.get_tensor_model_parallel_src_rank(),
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    return [part.view(item.shape) for part, item in zip(flat.split(sizes), frames, strict=True)]
