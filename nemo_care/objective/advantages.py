"""Advantages of a group's completions, and the table of `algorithm.advantage`."""

from collections.abc import Callable

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps) within each group (arXiv 2506.16141, step 6).

    `rewards` [B, G] is the base reward plus the consistency bonus; std is the unbiased one
    (n - 1). Returns [B, G] of the same type (float32 for integers). A group whose rewards are all
    equal, or a group of one, gets exactly 0.

    Raises ValueError when `rewards` isn't [B, G] with G >= 1, or holds NaN or infinity, which
    would spread to the whole group and from there to the weights.
    """
    centered = _centered(rewards)
    degrees_of_freedom = max(rewards.shape[1] - 1, 1)
    std = (centered.square().sum(dim=-1, keepdim=True) / degrees_of_freedom).sqrt()
    return _typed(torch.where(std == 0, 0.0, centered / (std + eps)), rewards)


def centered_advantages(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean(r) within each group (Dr.GRPO, arXiv 2503.20783, section 3.2).

    Without the division by the standard deviation, groups that are nearly all right or all wrong
    have no more weight than their rewards differ. Shapes, types and errors as in
    `group_advantages`.
    """
    return _typed(_centered(rewards), rewards)


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean of the others' rewards within each group (RLOO, arXiv 2402.14740).

    The baseline does not depend on completion i itself, so it leaves the gradient unbiased. It
    equals `centered_advantages` times G / (G - 1). Shapes, types and errors as in
    `group_advantages`; a group of one gets 0.
    """
    size = rewards.shape[-1]
    return _typed(_centered(rewards) * (size / max(size - 1, 1)), rewards)


def _centered(rewards: Tensor) -> Tensor:
    """Return r_i - mean(r) [B, G] in float64, exactly 0 in groups whose rewards are all equal."""
    if rewards.dim() != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards need the shape [B, G], not {tuple(rewards.shape)}")
    if not rewards.isfinite().all():
        raise ValueError("rewards hold NaN or infinity: look at the reward functions' output")
    exact = rewards.double()
    centered = exact - exact.mean(dim=-1, keepdim=True)
    # Compare the rewards, not std: the mean of equal numbers can differ from them by a rounding
    # error, which a division by eps would enlarge to a small but wrong advantage.
    all_equal = exact.amax(dim=-1, keepdim=True) == exact.amin(dim=-1, keepdim=True)
    return torch.where(all_equal, 0.0, centered)


def _typed(advantages: Tensor, rewards: Tensor) -> Tensor:
    """Convert to the type of the rewards, float32 for integers."""
    return advantages.to(rewards.dtype if rewards.is_floating_point() else torch.float32)


ADVANTAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "grpo": group_advantages,
    "dr_grpo": centered_advantages,
    "rloo": leave_one_out_advantages,
}
"""By name in `algorithm.advantage`: functions of rewards [B, G] that return advantages [B, G]."""
