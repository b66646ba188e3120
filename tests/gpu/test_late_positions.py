"""Rotary angles of late positions are those of float64: no product is rounded to TF32."""

import pytest
from gpu_passes import Job
from rotary_angles import BOUND, QWEN2_5_AXES, QWEN3_AXES, largest_error
from tiny_qwen3_vl import write_tiny_qwen3

pytestmark = pytest.mark.gpu


def test_angles_of_qwen2_5_vl_are_exact(job: Job):
    assert largest_error(job.checkpoint, job.world, job.ranks, QWEN2_5_AXES) <= BOUND


def test_angles_of_qwen3_vl_are_exact(job: Job, tmp_path):
    checkpoint = write_tiny_qwen3(tmp_path / "qwen3")
    assert largest_error(checkpoint, job.world, job.ranks, QWEN3_AXES) <= BOUND
