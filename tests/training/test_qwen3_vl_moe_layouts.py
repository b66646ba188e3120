"""A tiny Qwen3-VL with experts in every parallel layout computes what transformers computes.

The checks are those of the other families, in `test_layouts.py`.
"""

import pytest
from test_layouts import (  # noqa: F401
    base,
    folder,
    golden,
    greedy,
    in_layout,
    made_job,
    test_export_is_bit_equal_to_the_original,
    test_exported_directory_loads_in_transformers,
    test_golden_step_exercises_every_mechanism,
    test_greedy_tokens_equal_hugging_face_given_the_same_positions,
    test_logits_equal_hugging_face,
    test_sampled_tokens_are_the_same_in_every_layout,
    test_whole_step_equals_plain_torch,
)
from tiny_qwen3_vl import EXPERTS, write_tiny_qwen3

pytestmark = pytest.mark.numeric

NAMES = [
    *("tp1", "pp2", "ep2", "tp2_ep2_etp2_sequence_parallel"),
    # The last one has tensor parallelism and two replicas too.
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("tp2_sequence_parallel", "dp2", "tp2_ep2_sequence_parallel")
    ),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    # transformers can't continue a vision token, which this model does not sample.
    return write_tiny_qwen3(tmp_path_factory.mktemp("experts") / "checkpoint", EXPERTS, seed=2)


@pytest.fixture(scope="module")
def job(checkpoint, world, folder):  # noqa: F811
    return made_job(checkpoint, world, folder, only="parity")


@pytest.fixture(scope="module", params=NAMES)
def layout(on_ranks, request, job, base):  # noqa: F811
    return in_layout(on_ranks, request.param, job, base)
