"""Runs of a tiny Qwen3-VL with experts: steps, checkpoints and resuming do not depend on how the
experts are distributed.

The checks are those of the other families, in `test_layouts.py`.
"""

import pytest
from test_layouts import (  # noqa: F401
    base,
    folder,
    in_layout,
    loaded,
    made_job,
    test_a_run_of_one_process_resumes_in_every_layout,
    test_first_training_step_is_the_same_in_every_layout,
    test_step_with_a_kl_term_is_the_same_in_every_layout,
    test_what_every_layout_saves_one_process_loads,
)
from test_qwen3_vl_moe_layouts import checkpoint  # noqa: F401

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def job(checkpoint, world, folder):  # noqa: F811
    return made_job(checkpoint, world, folder, only="runs")


# Its parity with tensor parallelism is in test_qwen3_vl_moe_layouts.py.
WITH_TENSOR_PARALLEL = pytest.param("tp2_ep2_sequence_parallel", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["ep2", WITH_TENSOR_PARALLEL])
def layout(on_ranks, request, job, base):  # noqa: F811
    return in_layout(on_ranks, request.param, job, base)
