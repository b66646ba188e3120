"""A tiny Qwen3-VL with experts in every parallel layout computes what transformers computes."""

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
from tiny_qwen3_vl import EXPERTS, write_tiny_qwen3

pytestmark = pytest.mark.numeric

NAMES = [
    *("tp1", "ep2", "tp2_ep2_etp2_sequence_parallel"),
    # The last one has tensor parallelism and two replicas too; test_routing_replay.py has stages.
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("tp2_sequence_parallel", "pp2", "dp2", "tp2_ep2_sequence_parallel")
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
def layout(request, in_layout):  # noqa: F811
    return in_layout(request.param, "parity")
