"""Two commands in one run directory, and one command given again."""

import json
import shutil
import signal
import socket

import pytest
from fault_runs import STEPS, assert_equal_runs


def test_a_second_start_in_the_directory_of_a_run_is_refused(run, undisturbed, report):
    first = run.start("DP 2", "trainer.max_steps=6")
    run.wait_for_step(1)
    holder = json.loads((run.folder / "run.lock").read_text())
    assert holder["pid"] == first.ranks.pids[0]
    second = run.start("DP 2")
    assert second.wait() == [2, 2]
    (message,) = {line for line in run.output().splitlines() if line.startswith("nemo-care: ")}
    assert f"{run.folder} is in use by nemo-care train on {socket.gethostname()}" in message
    assert f"(process {holder['pid']}, since {holder['since']})" in message
    # An evaluation into it too.
    evaluation = run.server.start(
        1,
        [
            *("-m", "nemo_care", "evaluate", "--config-name", "tiny_cpu"),
            *("data.validation.kind=jsonl", f"data.validation.root={run.world}"),
            f"exp_manager.explicit_log_dir={run.folder}",
        ],
    )
    assert evaluation.wait() == [2]
    assert "is in use by nemo-care train" in evaluation.output()
    assert first.wait() == [0, 0], first.ranks.output()
    assert_equal_runs(run, undisturbed("DP 2"))
    assert not (run.folder / "run.lock").exists()
    report("a second train or evaluate in the run directory", "exit status 2, names it", "nothing")


@pytest.mark.slow  # test_run_lock.py kills a holder, and test_kills.py a run
def test_a_lock_whose_holder_was_killed_stands_in_no_ones_way(run):
    start = run.start("one")
    run.wait_for_step(3)
    start.signal(signal.SIGKILL, 0)
    start.wait()
    assert (run.folder / "run.lock").exists()
    run.finish("one")
    assert run.steps() == [*range(1, STEPS + 1)]


def test_the_command_of_a_finished_run_given_again_changes_nothing(run, undisturbed, report):
    shutil.copytree(undisturbed("DP 2").folder, run.folder, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    again = run.start("DP 2")
    assert again.wait() == [0, 0]
    assert f"the run in {run.folder} is finished with {STEPS} steps" in run.output()
    other = run.start("DP 2", "trainer.seed=17")
    assert other.wait() == [2, 2]
    assert "nothing would be done with another recipe (trainer.seed: " in run.output()
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    report("the command of a finished run again", "says so; exit status 0", "nothing")
