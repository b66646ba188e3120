"""A model's rotary angles against the same formula in float64."""

from pathlib import Path

import torch
from small_runs import small_recipe

from nemo_care.ranks.process_groups import Ranks
from nemo_care.training.build import load_model

# A float32 frequency is off by up to 2^-24 of its size, and so is the product: 0.002 rad. TF32 has
# 11 bits, and is off by rads.
POSITION = 16_000
BOUND = 2 * POSITION * 2**-24
# Of the tiny checkpoints: which frequency turns with time (0), height (1) and width (2).
QWEN2_5_AXES = [0] * 4 + [1] * 6 + [2] * 6
QWEN3_AXES = [0, 1, 2] * 5 + [0]


def largest_error(checkpoint: Path, world: Path, ranks: Ranks, axes: list[int]) -> float:
    """Return how far the angles of positions up to 16,000 are off, in rad.

    Args:
        checkpoint: of the model.
        world: data for its recipe.
        ranks: a world of one rank.
        axes: for each frequency of a head, its axis, as above.
    """
    model = load_model(small_recipe(checkpoint, world), ranks).language_model
    device = next(model.parameters()).device
    time = torch.tensor([0, 1, 3000, POSITION])
    positions = torch.stack([time, (time - 7).abs(), (time - 100).abs()])[:, None]
    found = model.rotary_pos_emb(positions.to(device), model.config.mrope_section)
    count = len(axes)
    frequencies = 1e4 ** -(torch.arange(count, dtype=torch.float64) / count)
    # [S, frequencies]; each turns the channels c and c + count of a head.
    exact = positions[axes, 0].t() * frequencies
    exact = torch.cat([exact, exact], dim=-1)[:, None, None]
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    return float((found.cpu().double() - exact).abs().max())
