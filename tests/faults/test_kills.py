"""Ranks that are killed or told to stop: the run ends soon, and the next start goes on."""

import signal
import time

import pytest
from fault_runs import STEPS, assert_equal_runs


@pytest.mark.parametrize(
    ("layout", "rank", "phase"),
    [
        pytest.param("PP 2", 0, "rollout", marks=pytest.mark.slow),
        pytest.param("DP 2", 1, "rollout", marks=pytest.mark.slow),
        pytest.param("DP 2", 0, "scoring", marks=pytest.mark.slow),
        pytest.param("PP 2", 1, "scoring", marks=pytest.mark.slow),
        pytest.param("TP 2", 0, "update", marks=pytest.mark.slow),
        pytest.param("DP 2", 1, "update", marks=pytest.mark.slow),
        ("DP 2", 0, "checkpoint"),
        pytest.param("TP 2", 1, "checkpoint", marks=pytest.mark.slow),
    ],
)
def test_killed_rank_costs_only_what_was_not_saved(run, undisturbed, report, layout, rank, phase):
    in_save = phase == "checkpoint"
    fault = {"kind": "kill", "rank": rank, "phase": phase, "step": 4 if in_save else 5}
    # With a thread that writes beside the training, step 5 may begin before 4 is saved.
    start = run.start(layout, f"checkpoint.asynchronous={in_save}", fault=fault)
    run.wait_for_step(4)
    struck = time.monotonic()
    statuses = start.wait()
    ended = time.monotonic() - struck
    assert statuses[rank] == -signal.SIGKILL
    assert statuses[1 - rank] == 1, run.output()
    assert not start.left_over()
    saved = 2 if in_save else 4
    assert run.checkpoints()[-1] == saved
    trained = run.steps()[-1]
    seconds = run.finish(layout)
    assert f"resumed after step {saved} from" in run.output()
    assert_equal_runs(run, undisturbed(layout))
    report(
        f"kill -9 of rank {rank} ({layout}) in {phase}",
        f"the other rank failed within {ended:.1f} s; goes on after step {saved}",
        f"steps {saved + 1} to {trained} and the one in flight"
        if in_save
        else "the step in flight",
        seconds,
    )


@pytest.mark.parametrize(
    ("number", "rank", "status"),
    [
        (signal.SIGTERM, 0, 75),
        pytest.param(signal.SIGUSR1, 1, 75, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 1, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 0, 129, marks=pytest.mark.slow),
    ],
)
def test_signal_to_any_rank_lets_the_step_end_and_saves(
    run, undisturbed, report, number, rank, status
):
    start = run.start("DP 2")
    run.wait_for_step(3)
    start.signal(number, rank)
    assert start.wait() == [status, status], run.output()
    assert not start.left_over()
    (last,) = run.steps()[-1:]
    assert run.checkpoints()[-1] == last < STEPS
    assert f"stopped after step {last} because {number.name} was received" in run.output()
    seconds = run.finish("DP 2")
    assert_equal_runs(run, undisturbed("DP 2"))
    report(
        f"{number.name} to rank {rank} (DP 2)",
        f"exit status {status} after step {last}",
        "nothing",
        seconds,
    )


@pytest.mark.slow  # test_layouts.py resumes a run in every layout
def test_run_goes_on_in_other_layouts(run, undisturbed, report):
    for steps, layout in ((2, "TP 2"), (4, "DP 2")):
        fault = {"kind": "kill", "rank": 0, "phase": "rollout", "step": steps + 1}
        start = run.start(layout, "checkpoint.asynchronous=false", fault=fault)
        assert -signal.SIGKILL in start.wait()
        assert run.checkpoints()[-1] == steps
    seconds = run.finish("PP 2")
    whole = undisturbed("DP 2")
    assert run.steps() == whole.steps()
    for mine, other in zip(run.metrics(), whole.metrics(), strict=True):
        assert mine == pytest.approx(other, abs=1e-3), mine["step"]
    report("resume at TP 2, DP 2, PP 2 in turn", "same metrics within 1e-3", "nothing", seconds)
