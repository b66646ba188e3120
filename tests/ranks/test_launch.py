"""A rank that dies ends the run with its name and traceback, not with a hang."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from nemo_care.process.cores import available_cores

STARTER = """
import sys
from nemo_care.ranks.launch import start_ranks
if __name__ == "__main__":
    sys.exit(start_ranks(2, [sys.argv[1]]))
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


def test_ranks_share_the_cores_and_meet_on_this_machine(tmp_path, monkeypatch):
    """The host's name need not resolve to any address."""
    program, starter = tmp_path / "program.py", tmp_path / "starter.py"
    program.write_text(
        "import os\nprint(os.environ['OMP_NUM_THREADS'], os.environ['MASTER_ADDR'], flush=True)\n"
    )
    starter.write_text(STARTER)
    for given, threads in ((None, max(1, available_cores() // 2)), ("7", 7)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        done = subprocess.run(
            [sys.executable, str(starter), str(program)],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines() == [f"{threads} localhost"] * 2


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
STARTING = """
import sys
from nemo_care.ranks.launch import start_ranks
if __name__ == "__main__":
    sys.exit(start_ranks(2, sys.argv[1:]))
"""


@pytest.fixture
def hearing(tmp_path: Path, monkeypatch):
    """A starter with two ranks that hear signals, and the ranks."""
    program, starter = tmp_path / "program.py", tmp_path / "starter.py"
    program.write_text(HEARING)
    starter.write_text(STARTING)
    monkeypatch.setenv("HEARD", str(tmp_path))
    made = []

    def start(*arguments: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
        command = [sys.executable, str(starter), str(program), *arguments]
        # A group of its own, as a terminal's foreground job.
        process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        made.append(process)
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)  # for the last one's number
        return process, psutil.Process(process.pid).children()

    yield start
    for process in made:
        process.kill()
        process.wait()
        process.stderr.close()


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
    starter.send_signal(number)
    _, errors = starter.communicate(timeout=60)
    assert starter.returncode == status, errors
    assert sorted(errors.splitlines()) == [f"rank {rank} heard [{number:d}]" for rank in (0, 1)]


def test_a_second_ctrl_c_ends_ranks_that_do_not(hearing):
    starter, ranks = hearing("deaf")
    assert len(ranks) == 2
    starter.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert starter.poll() is None
    asked = time.monotonic()
    starter.send_signal(signal.SIGINT)
    _, errors = starter.communicate(timeout=60)
    assert time.monotonic() - asked < 10
    assert starter.returncode == 130, errors
    assert errors == "nemo-care: ended at once: SIGINT was received\n"
    assert not psutil.wait_procs(ranks, timeout=10)[1]


def test_a_signal_before_there_are_ranks_ends_the_starter(hearing, tmp_path):
    """A machine waits long for the others of its job."""
    program = tmp_path / "alone.py"
    program.write_text("""
from nemo_care.ranks.launch import start_ranks
from nemo_care.ranks.slurm import Node
if __name__ == "__main__":
    print("ready", flush=True)
    start_ranks(2, ["-c", "pass"], Node(0, 2, "here", "localhost", 0, "the run"))
""")
    process = subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors


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


def test_a_failed_rank_has_its_own_status_whatever_aborts_the_interpreters_end():
    """As gloo's threads do where the other ranks are gone."""
    done = subprocess.run([sys.executable, "-c", ABORTED], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "ValueError: broken on purpose" in done.stderr
    assert done.stdout == "others were told\n"
