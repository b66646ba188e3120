"""A tiny Qwen3-VL in every parallel layout computes what transformers computes."""

import pytest
from test_layouts import (  # noqa: F401
    TestParity,
    base,
    folder,
    golden,
    greedy,
    in_layout,
    made_job,
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
def layout(request, in_layout):  # noqa: F811
    return in_layout(request.param, "parity")
