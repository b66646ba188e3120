"""A rank that dies ends the run with its name and traceback, not with a hang."""

import contextlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from forked_ranks import ForkedProgram

from nemo_care.process.cores import available_cores

STARTER = """
import sys
from nemo_care.ranks.launch import start_ranks
if __name__ == "__main__":
    sys.exit(start_ranks(2, sys.argv[1:]))
"""
DYING = """
import os, time
if os.environ["RANK"] == "1":
    {how}
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("raise ValueError('broken on purpose')", 1, "rank 1 failed with exit status 1"),
        ("os.kill(os.getpid(), 9)", 1, "rank 1 failed with signal SIGKILL"),
        ("import sys; sys.exit(2)", 2, ""),
    ],
)
def test_one_dying_rank_ends_all(rank_server, tmp_path: Path, how, status, message):
    program, starter = tmp_path / "program.py", tmp_path / "starter.py"
    program.write_text(DYING.format(how=how))
    starter.write_text(STARTER)
    began = time.monotonic()
    done = rank_server.run([starter, program])
    assert done.returncode == status
    assert time.monotonic() - began < 60
    assert message in done.stderr
    if "ValueError" in how:
        assert "ValueError: broken on purpose" in done.stderr


def test_ranks_share_the_cores_and_meet_on_this_machine(rank_server, tmp_path):
    """The host's name need not resolve to any address."""
    program, starter = tmp_path / "program.py", tmp_path / "starter.py"
    program.write_text(
        "import os\nprint(os.environ['OMP_NUM_THREADS'], os.environ['MASTER_ADDR'], flush=True)\n"
    )
    starter.write_text(f"""
import os
from nemo_care.ranks.launch import start_ranks
if __name__ == "__main__":
    for given in ({{}}, {{"OMP_NUM_THREADS": "7"}}):
        os.environ.pop("OMP_NUM_THREADS", None)
        os.environ.update(given)
        start_ranks(2, [{str(program)!r}])
""")
    done = rank_server.run([starter])
    shared = max(1, available_cores() // 2)
    threads = [shared, shared, 7, 7]
    assert done.stdout.splitlines() == [f"{number} localhost" for number in threads], done.stderr


# Notes what it hears and ends with that, as a run that has saved; with an argument it never ends.
HEARING = """
import os, sys, threading
from nemo_care.process import ending
heard, noted = [], threading.Event()
def note(number):
    heard.append(number)
    noted.set()
ending.watch_run()
ending.on_request((lambda number: None) if sys.argv[1:] else note)
open(f"{os.environ['HEARD']}/{os.environ['RANK']}.pid", "w").write(str(os.getpid()))
noted.wait()
noted.clear()
noted.wait(0.5)  # would be the same signal once more
print(f"rank {os.environ['RANK']} heard {heard}", file=sys.stderr, flush=True)
os._exit(ending.status_of(heard[0]))
"""


@pytest.fixture
def hearing(rank_server, tmp_path: Path):
    """Starts a starter of two ranks that hear signals; gives it, and the ranks."""
    program, starter = tmp_path / "program.py", tmp_path / "starter.py"
    program.write_text(HEARING)
    starter.write_text(STARTER)
    made = []

    def start(*arguments: str) -> tuple[ForkedProgram, list[psutil.Process]]:
        command = [starter, program, *arguments]
        made.append(rank_server.begin(command, environment={"HEARD": str(tmp_path)}))
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # for the last one's number
        return made[-1], psutil.Process(made[-1].pid).children()

    yield start
    for process in made:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGINT, 130),
        # test_stopping.py closes a terminal.
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        (signal.SIGTERM, 75),
    ],
)
def test_a_signal_to_the_starter_reaches_each_rank_once(hearing, number, status):
    starter, _ = hearing()
    os.kill(starter.pid, number)
    done = starter.wait()
    assert done.returncode == status, done.stderr
    assert sorted(done.stderr.splitlines()) == [
        f"rank {rank} heard [{number:d}]" for rank in (0, 1)
    ]


def test_a_second_ctrl_c_ends_ranks_that_do_not(hearing):
    starter, ranks = hearing("deaf")
    assert len(ranks) == 2
    os.kill(starter.pid, signal.SIGINT)
    time.sleep(0.5)
    assert all(rank.is_running() for rank in ranks)
    asked = time.monotonic()
    os.kill(starter.pid, signal.SIGINT)
    done = starter.wait()
    assert time.monotonic() - asked < 10
    assert done.returncode == 130, done.stderr
    assert done.stderr == "nemo-care: ended at once: SIGINT was received\n"
    assert not psutil.wait_procs(ranks, timeout=10)[1]


def test_a_signal_before_there_are_ranks_ends_the_starter(rank_server, tmp_path):
    """A machine waits long for the others of its job."""
    program = tmp_path / "alone.py"
    program.write_text("""
from nemo_care.ranks.launch import start_ranks
from nemo_care.ranks.slurm import Node
if __name__ == "__main__":
    start_ranks(2, ["-c", "pass"], Node(0, 2, "here", "localhost", 0, "the run"))
""")
    starter = rank_server.begin([program])
    status = Path(f"/proc/{starter.pid}/status")
    while "Threads:\t1\n" in status.read_text():  # one more hears the signals
        time.sleep(0.01)
    time.sleep(1)
    os.kill(starter.pid, signal.SIGTERM)
    done = starter.wait()
    assert done.returncode == 75, done.stderr


ABORTED = """
import atexit, os
import torch.distributed as dist
from nemo_care.process.ending import leave
from nemo_care.ranks.launch import guarded

class AbortsTheEnd:
    def __del__(self):
        os.abort()

def main():
    raise ValueError("broken on purpose")

store = dist.HashStore()
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
atexit.register(print, "others were told")
kept = AbortsTheEnd()
leave(guarded(main))
"""


def test_a_failed_rank_has_its_own_status_whatever_aborts_the_interpreters_end(
    rank_server, tmp_path
):
    """As gloo's threads do where the other ranks are gone."""
    program = tmp_path / "program.py"
    program.write_text(ABORTED)
    done = rank_server.run([program])
    assert done.returncode == 1, done.stderr
    assert "ValueError: broken on purpose" in done.stderr
    assert done.stdout == "others were told\n"
