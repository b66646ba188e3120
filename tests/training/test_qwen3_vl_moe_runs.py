"""Runs of a tiny Qwen3-VL with experts: steps, checkpoints and resuming do not depend on how the
experts are distributed.

The checks are those of the other families, in `test_layouts.py`.
"""

import pytest
from test_layouts import (  # noqa: F401
    TestRuns,
    base,
    folder,
    in_layout,
    loaded,
    made_job,
)
from test_qwen3_vl_moe_layouts import checkpoint  # noqa: F401

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def job(checkpoint, world, folder):  # noqa: F811
    return made_job(checkpoint, world, folder, only="runs")


# Its parity with tensor parallelism is in test_qwen3_vl_moe_layouts.py.
WITH_TENSOR_PARALLEL = pytest.param("tp2_ep2_sequence_parallel", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["ep2", WITH_TENSOR_PARALLEL])
def run_layout(request, in_layout):  # noqa: F811
    return in_layout(request.param, "runs")
