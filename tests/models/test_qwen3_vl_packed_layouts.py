"""Packed groups of a tiny Qwen3-VL equal separate sequences in every parallel layout.

The checks are those of the other family, in `test_packed_layouts.py`.
"""

import pytest
from test_packed_layouts import (  # noqa: F401
    base,
    in_layout,
    job,
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


@pytest.fixture(
    scope="module",
    # Plain tensor parallelism is the other family's.
    params=["tp1", pytest.param("tp2", marks=pytest.mark.slow), "tp2_sequence_parallel", "pp2"],
)
def results(on_ranks, request, job, base):  # noqa: F811
    return in_layout(on_ranks, request.param, job, base)
