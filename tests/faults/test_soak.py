"""500 steps with a kill every 20, of ranks and starters: no loss of steps or memory adds up.

Long (a quarter of an hour on two cores):

    python -m pytest -m slow tests/faults/test_soak.py
"""

import random
import signal
import subprocess
import sys
import time
from statistics import mean

import psutil
import pytest
from fault_runs import Run, assert_equal_runs

STEPS = 500
EVERY = 20
# Every fourth kill is of `nemo-care train`, which has started the ranks.
STARTERS = 4
HOURS = 2 * 3600.0
# Where windows of a hundred steps begin, in which memory is compared.
WINDOWS = (100, 200, 300, 400)
SETTINGS = (
    f"trainer.max_steps={STEPS}",
    "checkpoint.save_interval=5",
    "checkpoint.export=false",
    "data.workers=1",
    "data.validation.annotations=null",
    "exp_manager.create_tensorboard_logger=false",
)


def kill_rank(run: Run, step: int, chance: random.Random) -> None:
    """Start ranks, and kill one of them at any moment after a step."""
    start = run.start("DP 2")
    run.wait_for_step(step)
    time.sleep(chance.random())
    start.signal(signal.SIGKILL, rank=chance.randrange(2))
    start.wait()
    assert not start.left_over()


def kill_starter(run: Run, step: int, chance: random.Random) -> None:
    """Start the whole command, and kill what has started the ranks: they save and end."""
    command = [sys.executable, *run.command("DP 2")]
    starter = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run.wait_for_step(step)
    time.sleep(chance.random())
    everyone = psutil.Process(starter.pid).children(recursive=True)
    starter.kill()
    starter.wait()
    assert not psutil.wait_procs(everyone, timeout=60)[1]
    assert run.checkpoints()[-1] == run.steps()[-1]


@pytest.mark.slow
def test_run_that_is_killed_again_and_again_equals_an_undisturbed_one(
    rank_server, world, tmp_path, report
):
    whole = Run(rank_server, tmp_path / "whole", world, SETTINGS, HOURS)
    whole.finish("DP 2")
    for name in ("memory/process_gib", "data/worker_memory_gib"):
        values = [record[name] for record in whole.records()]
        early, late = mean(values[50:100]), mean(values[-50:])
        assert late < 1.05 * early, name
        # A thread's first large allocation may add an arena at any time; a leak goes on.
        growth = [mean(values[i + 90 : i + 100]) - mean(values[i : i + 10]) for i in WINDOWS]
        assert min(growth) < 0.002 * early, name
        report(f"{name}, steps 51 to 100", f"{early:.3f} GiB", f"last 50: {late:.3f} GiB")
    killed = Run(rank_server, tmp_path / "killed", world, SETTINGS, HOURS)
    chance, lost = random.Random(0), 0
    kills = range(EVERY, STEPS, EVERY)
    for number, step in enumerate(kills, start=1):
        if number % STARTERS == 0:
            kill_starter(killed, step, chance)
        else:
            kill_rank(killed, step, chance)
        lost += killed.steps()[-1] - killed.checkpoints()[-1]
    killed.finish("DP 2")
    assert_equal_runs(killed, whole)
    assert [record["step"] for record in killed.records()] == [*range(1, STEPS + 1)]
    fault = f"{len(kills)} kills in {STEPS} steps, {len(kills) // STARTERS} of them of the starter"
    report(fault, "equals the undisturbed run", f"{lost} steps were made twice")
