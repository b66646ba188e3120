"""Advantages of a group's completions, and the table that `algorithm.advantage` chooses from."""

from collections.abc import Callable

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps) within each group (arXiv 2506.16141, step 6).

    `rewards` [B, G] is the base reward plus the consistency bonus; std is the unbiased one
    (n - 1). Returns [B, G] of the same type (float32 for integers). A group whose rewards are all
    equal gets exactly 0, a group of one too.

    Raises ValueError when `rewards` isn't [B, G] with G >= 1, or holds NaN or infinity, which
    would spread to the whole group and from there to the weights.
    """
    if rewards.dim() != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards need the shape [B, G], not {tuple(rewards.shape)}")
    if not rewards.isfinite().all():
        raise ValueError("rewards hold NaN or infinity: look at the reward functions' output")
    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    exact = rewards.double()
    centered = exact - exact.mean(dim=-1, keepdim=True)
    degrees_of_freedom = max(rewards.shape[1] - 1, 1)
    std = (centered.square().sum(dim=-1, keepdim=True) / degrees_of_freedom).sqrt()
    # Equality is asked of the rewards, not of std: the mean of equal numbers can miss them by a
    # rounding error, which the division by eps would enlarge to a small but wrong advantage.
    all_equal = exact.amax(dim=-1, keepdim=True) == exact.amin(dim=-1, keepdim=True)
    return torch.where(all_equal, 0.0, centered / (std + eps)).to(dtype)


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {"grpo": group_advantages}
"""By the name that a recipe gives in `algorithm.advantage`: rewards [B, G] -> advantages [B, G]."""
