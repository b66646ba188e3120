"""A tiny Qwen3-VL in every parallel layout computes what transformers computes.

The checks are those of the other family, in `test_layouts.py`.
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
from tiny_qwen3_vl import write_tiny_qwen3

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_qwen3(tmp_path_factory.mktemp("qwen3") / "checkpoint")


@pytest.fixture(scope="module")
def job(checkpoint, world, folder):  # noqa: F811
    return made_job(checkpoint, world, folder, only="parity")


@pytest.fixture(
    scope="module",
    params=[
        *("tp1", "tp2_sequence_parallel", "pp2"),
        # Nothing in them depends on the family: they are Qwen2.5-VL's.
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("tp2", "dp2")),
    ],
)
def layout(on_ranks, request, job, base):  # noqa: F811
    return in_layout(on_ranks, request.param, job, base)
