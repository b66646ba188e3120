"""A run that is asked to stop saves, exits with a status of its own, and goes on when restarted."""

import fcntl
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import psutil
import pytest
from records import lines
from small_runs import small_recipe, small_trainer

from nemo_care.errors import InputError, RunStopped
from nemo_care.ranks.stop_request import StopRequest
from nemo_care.recipe.schema import seconds_of


@pytest.fixture
def recipe(checkpoint, world):
    recipe = small_recipe(checkpoint, world)
    recipe.checkpoint.save_interval = 100
    return recipe


class AskedAfter(StopRequest):
    """A signal arrives while the given step runs."""

    def __init__(self, step):
        super().__init__()
        self.steps = step

    def agreed(self):
        self.steps -= 1
        if self.steps == 0:
            self.note(signal.SIGUSR1)
        return super().agreed()


def test_a_stopped_run_goes_on_as_if_it_had_never_been(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 3
    small_trainer(recipe, ranks, tmp_path / "whole", saves=False).fit()
    trainer = small_trainer(recipe, ranks, tmp_path / "parts")
    trainer.stop = AskedAfter(2)
    with pytest.raises(RunStopped, match="stopped after step 2 because SIGUSR1 was received"):
        trainer.fit()
    assert not (tmp_path / "parts/summary.json").exists()
    small_trainer(recipe, ranks, tmp_path / "parts").fit()
    for step in (1, 2, 3):
        file = f"rollouts/step_{step:06d}.jsonl"
        assert (tmp_path / "parts" / file).read_text() == (tmp_path / "whole" / file).read_text()
    records = [lines(tmp_path / run / "metrics.jsonl") for run in ("whole", "parts")]
    for whole, parts in zip(*records, strict=True):
        same = [key for key in whole if not key.startswith(("timing/", "memory/"))]
        assert {key: whole[key] for key in same} == {key: parts[key] for key in same}


def test_nothing_is_saved_twice(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 3
    recipe.checkpoint.save_interval = 2
    trainer = small_trainer(recipe, ranks, tmp_path)
    trainer.stop = AskedAfter(2)
    written = []
    save = trainer.save
    trainer.save = lambda: (written.append(trainer.step), save())
    with pytest.raises(RunStopped):
        trainer.fit()
    assert written == [2]


def test_a_validation_is_left_between_two_batches_and_comes_again(recipe, ranks, tmp_path):
    recipe.trainer.max_steps = 1
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    recipe.evaluation.samples_per_batch = 3  # of 8
    whole = small_trainer(recipe, ranks, tmp_path / "whole", saves=False).fit()
    # The second batch before the first step; then the step; then the first batch behind it.
    for asked, steps in ((2, 0), (5, 1)):
        trainer = small_trainer(recipe, ranks, tmp_path / "parts")
        trainer.stop = AskedAfter(asked)
        with pytest.raises(RunStopped, match=f"stopped after step {steps}"):
            trainer.fit()
    summary = small_trainer(recipe, ranks, tmp_path / "parts").fit()
    assert (summary["start"], summary["end"]) == (whole["start"], whole["end"])
    validations = lines(tmp_path / "parts/validation.jsonl")
    assert [record["step"] for record in validations] == [0, 1]


def test_time_that_is_over_stops_the_run(recipe, ranks, tmp_path):
    trainer = small_trainer(recipe, ranks, tmp_path)
    trainer.stop = StopRequest(seconds=0.0)
    with pytest.raises(RunStopped, match=r"step 1 because trainer\.max_time_per_run is over"):
        trainer.fit()
    assert StopRequest(seconds=1000).agreed() is None
    assert StopRequest().agreed() is None


def test_durations_are_written_as_nemo_writes_them():
    assert seconds_of("00:03:45:00") == 3 * 3600 + 45 * 60
    assert seconds_of("1:00:00:07") == 86407
    for wrong in ("3:45:00", "90", "a:00:00:00", "00:03:45:00 "):
        with pytest.raises(InputError, match=r"trainer\.max_time_per_run=.*00:03:45:00"):
            seconds_of(wrong)


# Slow: test_launch.py signals the starter of a small program, and test_kills.py ranks of a run.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("to_whom", "number"), [("starter", signal.SIGTERM), ("rank", signal.SIGUSR1)]
)
def test_a_signal_to_starter_or_rank_stops_all_ranks_with_a_checkpoint(
    world, tmp_path, to_whom, number
):
    run = tmp_path / "run"
    command = train_command(world, run, "trainer.devices=2")
    starter = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = psutil.Process(starter.pid).children()
    assert len(ranks) == 2
    os.kill(starter.pid if to_whom == "starter" else ranks[1].pid, number)
    _, errors = starter.communicate(timeout=120)
    assert starter.returncode == 75, errors.decode()
    steps = len(lines(run / "metrics.jsonl"))
    assert f"stopped after step {steps} because {number.name} was received" in errors.decode()
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{steps:06d}"]
    psutil.wait_procs(ranks, timeout=20)
    assert not any(rank.is_running() for rank in ranks)


def train_command(world, run, *more):
    return [
        *(sys.executable, "-m", "nemo_care.train", "--config-name", "tiny_cpu"),
        *(f"data.train.root={world}", "data.train.kind=jsonl", "data.validation.annotations=null"),
        *("trainer.max_steps=1000", "algorithm.prompts_per_step=4"),
        *(f"exp_manager.explicit_log_dir={run}", *more),
    ]


def test_a_closed_terminal_lets_the_step_end_and_saves(world, tmp_path):
    """What is printed to it afterwards fails, and must not end the run before it has saved."""
    run = tmp_path / "run"
    ours, theirs = pty.openpty()

    def take_terminal():
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    trainer = subprocess.Popen(
        train_command(world, run),
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    # Nobody would empty the terminal otherwise.
    reader = threading.Thread(target=read_until, args=(ours, run / "metrics.jsonl"))
    reader.start()
    reader.join()
    os.close(ours)
    assert trainer.wait(timeout=120) == 129
    steps = len(lines(run / "metrics.jsonl"))
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{steps:06d}"]


def read_until(terminal, file):
    deadline = time.monotonic() + 200
    while not file.exists() and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            os.read(terminal, 65536)


@pytest.mark.parametrize("after", [0.05, 1.5])
def test_sigterm_while_importing_has_its_own_status(world, tmp_path, after):
    command = train_command(world, tmp_path / "run")
    assert ended_early(command, signal.SIGTERM, after) == (
        75,
        "nemo-care: ended at once: SIGTERM was received\n",
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config-name", "tiny_cpu"],
        ["study", "--config-name", "miniature"],
        ["doctor"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_ctrl_c_while_importing_ends_any_command_without_a_traceback(arguments, tmp_path):
    status, errors = ended_early([*COMMAND, *arguments], signal.SIGINT, 0.2, cwd=tmp_path)
    assert status == 130
    assert errors in (
        "nemo-care: ended at once: SIGINT was received\n",
        "nemo-care: interrupted\n",
    )


COMMAND = (sys.executable, "-m", "nemo_care.cli")


def ended_early(command, number, after, **keywords):
    """Status and errors of a command that gets a signal some seconds after it listens."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **keywords)
    status = Path(f"/proc/{process.pid}/status")
    while "Threads:\t1\n" in status.read_text():  # one more hears the signals
        time.sleep(0.001)
    time.sleep(after)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors
