"""Summing gradients while backward runs changes no result."""

from pathlib import Path

import pytest
import torch
from made_groups import make_groups, make_prompts

PROGRAM = Path(__file__).parents[1] / "helpers/overlap_program.py"


@pytest.mark.parametrize("name", ["dp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_overlapping_sums_give_the_same_steps(rank_server, name, checkpoint, world, tmp_path):
    # Both have videos: every parameter gets a gradient.
    groups = make_groups(make_prompts(checkpoint, world, tmp_path)[:2], checkpoint)
    torch.save({"checkpoint": checkpoint, "world": world, "groups": groups}, tmp_path / "job.pt")
    rank_server.run(2, [str(PROGRAM), str(tmp_path), name])
    result = torch.load(tmp_path / f"{name}.pt", weights_only=False)
    assert result[True]["norms"] == pytest.approx(result[False]["norms"], rel=1e-6)
    assert result[True]["norms"][0] > 0
    for kind in ("weights", "average"):
        for key, tensor in result[False][kind].items():
            torch.testing.assert_close(result[True][kind][key], tensor, atol=1e-6, rtol=1e-5)
