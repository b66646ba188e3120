"""Angles of late positions are those of float64; `tests/gpu/test_late_positions.py` on a GPU."""

import pytest
from rotary_angles import BOUND, QWEN2_5_AXES, QWEN3_AXES, largest_error
from tiny_qwen3_vl import write_tiny_qwen3


@pytest.mark.parametrize("axes", [QWEN2_5_AXES, QWEN3_AXES], ids=["qwen2_5_vl", "qwen3_vl"])
def test_angles_at_position_16000_are_exact(axes, checkpoint, world, ranks, tmp_path):
    if axes == QWEN3_AXES:
        checkpoint = write_tiny_qwen3(tmp_path / "qwen3")
    assert largest_error(checkpoint, world, ranks, axes) <= BOUND
