"""Rotary angles of three positions, interleaved: Megatron has them side by side only."""

import torch
from torch import Tensor


class InterleavedRotary(torch.nn.Module):
    """Turns a token's positions in time, height and width into the angles of a head's channels.

    The frequencies follow each other as T H W T H W ... as long as height and width have some left;
    the rest turn with time. Always in float32: positions of long prompts have no place in bfloat16.
    """

    def __init__(self, head_dim: int, base: float, section: list[int]) -> None:
        """`section`: how many of the head_dim / 2 frequencies turn with time, height and width."""
        super().__init__()
        device = torch.cuda.current_device()
        channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
        # Not a buffer: `model.bfloat16()` would round it.
        self.frequencies = 1.0 / base ** (channels / head_dim)
        axes = torch.zeros(head_dim // 2, dtype=torch.long, device=device)
        for axis in (1, 2):
            axes[axis : 3 * section[axis] : 3] = axis
        self.axes = axes

    def forward(
        self, position_ids: Tensor, section: object = None, cp_group: object = None
    ) -> Tensor:
        """Angles float32 [S, B, 1, head_dim] of positions [3, B, S]; what else Megatron gives is
        known already."""
        chosen = position_ids.to(self.axes.device).index_select(0, self.axes)
        angles = chosen.permute(2, 1, 0).float() * self.frequencies
        return torch.cat([angles, angles], dim=-1)[:, :, None]
