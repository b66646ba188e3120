"""Packed groups of a tiny Qwen3-VL with experts equal separate sequences in every parallel layout.

The checks are those of the other families, in `test_packed_layouts.py`.
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
from tiny_qwen3_vl import EXPERTS, write_tiny_qwen3

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_qwen3(tmp_path_factory.mktemp("experts") / "checkpoint", EXPERTS)


@pytest.fixture(
    scope="module",
    params=[
        *("tp1", "tp2_ep2_sequence_parallel"),
        # Pipelines of packed groups are the other families'.
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pp2", "ep2")),
    ],
)
def results(on_ranks, request, job, base):  # noqa: F811
    return in_layout(on_ranks, request.param, job, base)
