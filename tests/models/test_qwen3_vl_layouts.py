"""A tiny Qwen3-VL in every parallel layout computes what transformers computes.

The checks are those of the other family, in `test_layouts.py` and `test_packed_layouts.py`.
"""

import pytest
from test_layouts import (  # noqa: F401
    golden,
    run_alone,
    run_layout,
    test_export_is_bit_equal_to_the_original,
    test_exported_directory_loads_in_transformers,
    test_golden_step_exercises_every_mechanism,
    test_greedy_tokens_equal_hugging_face_given_the_same_positions,
    test_logits_equal_hugging_face,
    test_sampled_tokens_are_the_same_in_every_layout,
    test_whole_step_equals_plain_torch,
)
from test_packed_layouts import (  # noqa: F401
    folder,
    results,
    test_a_plain_causal_mask_gives_something_else,
    test_gradients_of_packed_groups_equal_those_of_separate_sequences,
    test_groups_without_any_answer_are_scored_too,
    test_values_and_gradients_do_not_depend_on_the_layout,
    test_values_of_packed_groups_equal_those_of_separate_sequences,
)
from tiny_qwen3_vl import write_tiny_qwen3

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_qwen3(tmp_path_factory.mktemp("qwen3") / "checkpoint")


@pytest.fixture(scope="module")
def job(rank_server, checkpoint, world, tmp_path_factory):
    work = tmp_path_factory.mktemp("layouts")
    return run_alone(rank_server, checkpoint, world, work, parity_only=True)


@pytest.fixture(scope="module", params=["tp1", "tp2", "tp2_sequence_parallel", "pp2", "dp2"])
def layout(rank_server, request, job):
    return run_layout(rank_server, request.param, job[0])
