"""Numbers and videos that are bad for one rank: the run leaves them out, says so, and goes on."""

import json

import pytest
from injections import HANGING

# Slow: test_bad_numbers.py and test_decoding.py have the same faults without the command around.
pytestmark = pytest.mark.slow


def test_gradient_that_is_nan_on_one_rank_leaves_the_step_out_on_all(run, undisturbed, report):
    fault = {"kind": "nan_gradient", "rank": 1, "phase": "update", "step": 3}
    start = run.start("DP 2", fault=fault)
    assert start.wait() == [0, 0], run.output()
    assert [record["train/bad_step"] for record in run.metrics()] == [0, 0, 1, 0, 0, 0]
    assert run.metrics()[:2] == undisturbed("DP 2").metrics()[:2]
    (about,) = (run.folder / "bad_steps").glob("*.json")
    (found,) = json.loads(about.read_text())["not_finite"]
    assert (about.stem, found["what"], found["first_rank"]) == ("step_000003", "gradient", 1)
    report("NaN in the gradient of rank 1 (DP 2)", "left out, inputs stored", "that update")


def test_video_that_never_ends_costs_its_sample(run, report):
    keys = ("data.workers=1", "data.seconds_per_sample=3", "data.max_skipped_fraction=0.3")
    # 48 samples: all of them in 12 steps.
    fault = {"kind": "hanging_decoder", "rank": 0}
    start = run.start("one", "trainer.max_steps=12", *keys, fault=fault)
    assert start.wait() == [0], run.output()
    assert not start.left_over()
    assert run.steps() == [*range(1, 13)]
    skipped = json.loads((run.folder / "skipped.jsonl").read_text())
    assert skipped["sample_id"] == HANGING
    assert "not decoded after data.seconds_per_sample=3" in skipped["reason"]
    waited = max(record["timing/data"] for record in run.records())
    report("a decoder that hangs", "skipped and listed", "the sample", waited)
