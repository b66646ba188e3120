"""The whole command with a rank that is killed: it says which, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from fault_runs import PATIENCE, assert_equal_runs


@pytest.mark.slow  # test_launch.py kills a rank of a small program, and test_kills.py one of a run
def test_killed_rank_is_named_and_nothing_is_left_running(run, undisturbed, report):
    command = [sys.executable, *run.command("DP 2", "checkpoint.asynchronous=false")]
    starter = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    run.wait_for_step(3)
    ranks = psutil.Process(starter.pid).children()
    everyone = psutil.Process(starter.pid).children(recursive=True)
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)
    killed = time.monotonic()
    _, errors = starter.communicate(timeout=PATIENCE)
    ended = time.monotonic() - killed
    assert starter.returncode == 1
    assert "rank 1 failed with signal SIGKILL" in errors.decode()
    assert not psutil.wait_procs(everyone, timeout=10)[1]
    saved, trained = run.checkpoints()[-1], run.steps()[-1]
    seconds = run.finish("DP 2")
    assert_equal_runs(run, undisturbed("DP 2"))
    report(
        "kill -9 of a rank of nemo-care train",
        f"named; exit status 1 after {ended:.1f} s; goes on after step {saved}",
        "the step in flight" if saved == trained else f"step {trained} and the one in flight",
        seconds,
    )


@pytest.mark.parametrize(
    "step", [pytest.param(0, id="while its ranks start", marks=pytest.mark.slow), 3]
)
def test_killed_starter_leaves_nothing_running(run, report, step):
    starter = run.server.begin(run.command("DP 2", "checkpoint.save_interval=100"))
    me = psutil.Process(starter.pid)
    deadline = time.monotonic() + PATIENCE
    if step:
        run.wait_for_step(step)
    while len(me.children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    everyone = me.children(recursive=True)
    assert len(everyone) >= 2
    me.kill()
    killed = time.monotonic()
    assert starter.wait().returncode == -signal.SIGKILL
    assert not psutil.wait_procs(everyone, timeout=25)[1]
    ended = time.monotonic() - killed
    if not step:
        assert run.checkpoints() == []
        return
    assert run.checkpoints() == [run.steps()[-1]]
    report(
        "kill -9 of nemo-care train",
        f"its ranks saved step {run.steps()[-1]}; nothing left after {ended:.1f} s",
        "nothing",
    )
