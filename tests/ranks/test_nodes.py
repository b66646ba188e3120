"""Starters of several machines, of which each starts its own ranks, as srun starts them."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_ranks import ForkedProgram, RankServer

from nemo_care.errors import InputError
from nemo_care.ranks.slurm import node_to_start, rendezvous_address

STEP = {
    "SLURM_JOB_ID": "70123",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURMD_NODENAME": "node08",
}
STARTER = """
import sys
from nemo_care.ranks.launch import start_ranks
from nemo_care.ranks.slurm import node_to_start
if __name__ == "__main__":
    sys.exit(start_ranks(2, [sys.argv[1]], node_to_start(2, 2)))
"""
RANK = """
import os, signal, sys, time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
place = os.environ["MASTER_ADDR"]
print(f"rank {os.environ['RANK']} of {int(total)} at {place}", flush=True)
"""
# Without torch, whose import takes each rank seconds.
SAYING = """
import os
name, size, place = (os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"))
print(f"rank {name} of {size} at {place}", flush=True)
"""
FAILING = "if os.environ['RANK'] == '3': raise ValueError('broken on purpose')\ntime.sleep(600)"
STOPPING = """
asked = []
signal.signal(signal.SIGUSR1, lambda number, frame: asked.append(number))
print("ready", flush=True)
while not asked:
    time.sleep(0.1)
dist.destroy_process_group()
sys.exit(75)
"""


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_a_task_per_machine_starts_ranks_and_a_task_per_rank_is_one(step):
    node = node_to_start(8, 2)
    assert (node.place, node.count, node.name) == (1, 2, "node08")
    assert node_to_start(1, 2) is None
    step.setenv("RANK", "3")
    assert node_to_start(8, 2) is None
    step.delenv("RANK")
    step.delenv("SLURM_STEP_NUM_TASKS")
    assert node_to_start(8, 2) is None


@pytest.mark.parametrize(("devices", "num_nodes"), [(8, 1), (8, 4), (2, 3)])
def test_any_other_number_of_tasks_is_refused(step, devices, num_nodes):
    with pytest.raises(
        InputError, match=rf"2 tasks on 2 machines.*devices={devices}.*num_nodes={num_nodes}"
    ):
        node_to_start(devices, num_nodes)


def test_two_tasks_on_one_of_two_machines_are_no_starters(step):
    step.setenv("SLURM_STEP_NUM_NODES", "1")
    with pytest.raises(InputError, match="2 tasks on 1 machines"):
        node_to_start(8, 2)


def test_the_machines_meet_on_the_first_at_a_port_of_the_job(step):
    assert rendezvous_address() == ("node07", 15000 + 70123 % 15000)
    first = node_to_start(8, 2).run_id
    step.setenv("SLURM_RESTART_COUNT", "1")
    assert rendezvous_address() == ("node07", 15000 + 70124 % 15000)
    assert node_to_start(8, 2).run_id != first
    step.setenv("MASTER_ADDR", "10.0.0.7")
    step.setenv("MASTER_PORT", "29500")
    assert rendezvous_address() == ("10.0.0.7", 29500)


@pytest.fixture
def start_both(rank_server: RankServer, tmp_path: Path) -> Callable[[str], list[ForkedProgram]]:
    """Starts two starters of two ranks each, on "machines" that are this one."""

    def start(code: str) -> list[ForkedProgram]:
        program, starter = tmp_path / "program.py", tmp_path / "starter.py"
        program.write_text(code)
        starter.write_text(STARTER)
        step = STEP | {
            "SLURM_JOB_ID": str(60_000 + os.getpid() % 10_000),
            "MASTER_ADDR": "127.0.0.1",
            "NEMO_CARE_RANK_LOGS": str(tmp_path / "ranks"),
        }
        places = [
            {"SLURM_NODEID": str(place), "SLURMD_NODENAME": f"node0{7 + place}"}
            for place in range(2)
        ]
        return [rank_server.begin([starter, program], environment=step | place) for place in places]

    return start


def test_two_starters_make_one_world_with_a_log_for_each_rank(start_both, tmp_path):
    done = [starter.wait() for starter in start_both(SAYING)]
    assert [one.returncode for one in done] == [0, 0], done
    logs = [(tmp_path / f"ranks/rank_{rank:04d}.out").read_text() for rank in range(4)]
    assert logs == [f"rank {rank} of 4 at 127.0.0.1\n" for rank in range(4)]
    # The screen shows one of them.
    assert "".join(one.stdout for one in done) == "rank 0: rank 0 of 4 at 127.0.0.1\n"


@pytest.mark.slow
def test_a_failing_rank_is_named_with_its_machine_and_traceback(start_both):
    starters = start_both(RANK + FAILING)
    began = time.monotonic()
    while time.monotonic() - began < 100:
        if any("failed with" in starter.errors.read_text() for starter in starters):
            break
        time.sleep(0.1)
    # What srun --kill-on-bad-exit does to the others; here it must end their ranks too.
    for starter in starters:
        with contextlib.suppress(ProcessLookupError):
            os.kill(starter.pid, signal.SIGINT)
    outputs = [starter.wait().stderr for starter in starters]
    failed = [text for text in outputs if "rank 3 on node0" in text]
    assert len(failed) == 1, outputs
    # With exit status 1, or a signal: gloo's threads may abort a process that leaves by an error.
    assert "failed with" in failed[0]
    assert "ValueError: broken on purpose" in failed[0]


@pytest.mark.slow
def test_a_signal_to_each_starter_reaches_all_ranks_and_their_status_comes_back(
    start_both, tmp_path
):
    starters = start_both(RANK + STOPPING)
    logs = [tmp_path / f"ranks/rank_{rank:04d}.out" for rank in range(4)]
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if all(log.is_file() and "ready" in log.read_text() for log in logs):
            break
        time.sleep(0.1)
    for starter in starters:
        os.kill(starter.pid, signal.SIGUSR1)
    done = [starter.wait() for starter in starters]
    assert [one.returncode for one in done] == [75, 75], done
