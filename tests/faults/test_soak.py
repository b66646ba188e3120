"""500 steps with a kill every 20: nothing adds up, neither lost steps nor memory.

Long (a quarter of an hour on two cores):

    python -m pytest -m slow tests/faults/test_soak.py
"""

import random
import signal
import time
from statistics import mean

import pytest
from fault_runs import Run, assert_equal_runs

STEPS = 500
EVERY = 20
HOURS = 2 * 3600.0
SETTINGS = (
    f"trainer.max_steps={STEPS}",
    "checkpoint.save_interval=5",
    "checkpoint.export=false",
    "data.workers=1",
    "data.validation.annotations=null",
    "exp_manager.create_tensorboard_logger=false",
)


@pytest.mark.slow
def test_run_that_is_killed_again_and_again_equals_an_undisturbed_one(
    rank_server, world, tmp_path, report
):
    whole = Run(rank_server, tmp_path / "whole", world, SETTINGS, HOURS)
    whole.finish("DP 2")
    for name in ("memory/process_gib", "data/worker_memory_gib"):
        values = [record[name] for record in whole.records()]
        early, middle, late = mean(values[50:100]), mean(values[225:275]), mean(values[-50:])
        # A thread's first large allocation may add an arena once; a leak goes on.
        assert late < 1.05 * early, name
        assert late < 1.01 * middle, name
        report(f"{name}, steps 51 to 100", f"{early:.3f} GiB", f"last 50: {late:.3f} GiB")
    killed = Run(rank_server, tmp_path / "killed", world, SETTINGS, HOURS)
    chance, lost, kills = random.Random(0), 0, 0
    for step in range(EVERY, STEPS, EVERY):
        start = killed.start("DP 2")
        # Any moment of the step.
        killed.wait_for_step(step)
        time.sleep(chance.random())
        start.signal(signal.SIGKILL, rank=chance.randrange(2))
        start.wait()
        assert not start.left_over()
        lost += killed.steps()[-1] - killed.checkpoints()[-1]
        kills += 1
    killed.finish("DP 2")
    assert_equal_runs(killed, whole)
    assert [record["step"] for record in killed.records()] == [*range(1, STEPS + 1)]
    fault = f"{kills} kills in {STEPS} steps"
    report(fault, "equals the undisturbed run", f"{lost} steps were made twice")
