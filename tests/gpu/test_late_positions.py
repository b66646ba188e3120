"""Rotary angles of late positions are those of float64: no product is rounded to TF32."""

import pytest
from gpu_passes import Job
from rotary_angles import BOUND, QWEN2_5_AXES, QWEN3_AXES, largest_error
from tiny_qwen3_vl import write_tiny_qwen3

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("axes", [QWEN2_5_AXES, QWEN3_AXES], ids=["qwen2_5_vl", "qwen3_vl"])
def test_angles_at_position_16000_are_exact(job: Job, axes, tmp_path):
    checkpoint = write_tiny_qwen3(tmp_path / "qwen3") if axes == QWEN3_AXES else job.checkpoint
    assert largest_error(checkpoint, job.world, job.ranks, axes) <= BOUND
