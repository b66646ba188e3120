"""Signals and the starter's death, in small programs that are really signalled and killed."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from nemo_care.process import ending

PATIENCE = 60.0  # seconds, for a loaded machine


class Program:
    """A Python program that prints lines; it and what it starts are killed in the end."""

    def __init__(self, code, *, before=None, new_session=True):
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=new_session,
            preexec_fn=before,
        )

    def line(self):
        return self.process.stdout.readline().strip()

    def kill(self, number):
        self.process.send_signal(number)

    def end(self):
        """Exit status and errors."""
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors


@pytest.fixture
def program():
    made = []

    def start(code, **keywords):
        made.append(Program(code, **keywords))
        return made[-1]

    yield start
    for one in made:
        if one.process.poll() is None:
            for process in psutil.Process(one.process.pid).children(recursive=True):
                process.kill()
        one.process.kill()
        one.process.wait()
        one.process.stdout.close()
        one.process.stderr.close()


def gone(pid):
    deadline = time.monotonic() + PATIENCE
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# Waits as a collective does: no Python code runs in the main thread.
STUCK = """
import ctypes, subprocess, sys, time
from nemo_care.process import ending
ending.watch_run()
{more}
child = subprocess.Popen(
    ["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
)
print(child.pid, flush=True)
libc = ctypes.CDLL(None)
while True:
    libc.sleep(600)
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 75),
        (signal.SIGUSR1, 75),
        (signal.SIGINT, 130),
        (signal.SIGHUP, 129),
    ],
)
def test_before_a_run_begins_a_signal_ends_it_with_all_that_it_started(program, number, status):
    started = program(STUCK.format(more=""))
    child = int(started.line())
    started.kill(number)
    assert started.end() == (status, f"nemo-care: ended at once: {number.name} was received\n")
    assert gone(child)


NOTED = (
    "from nemo_care.process.ending import on_request; on_request(lambda n: print(n, flush=True))"
)


def test_a_second_ctrl_c_ends_at_once_also_where_the_main_thread_is_stuck(program):
    started = program(STUCK.format(more=NOTED))
    child = int(started.line())
    started.kill(signal.SIGINT)
    assert started.line() == "2"
    time.sleep(0.3)  # sooner, it would be the same request
    started.kill(signal.SIGINT)
    assert started.end()[0] == 130
    assert gone(child)


def test_one_ctrl_c_that_arrives_twice_is_one_request(program):
    """`timeout -s INT` signals its command and then its group."""
    started = program(STUCK.format(more=NOTED))
    started.line()
    started.kill(signal.SIGINT)
    assert started.line() == "2"
    started.kill(signal.SIGINT)
    started.kill(signal.SIGTERM)
    assert started.line() == "15"
    assert started.process.poll() is None


def test_what_is_ignored_at_the_start_stays_ignored(program):
    """As under nohup, and for a script's background processes."""

    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    started = program(STUCK.format(more=NOTED), before=ignore)
    started.line()
    started.kill(signal.SIGHUP)
    started.kill(signal.SIGINT)
    started.kill(signal.SIGTERM)
    assert started.line() == "15"


def test_a_signal_that_a_library_handles_is_no_request(program):
    handling = "import signal; signal.signal(signal.SIGUSR2, lambda *_: None)\n" + NOTED
    started = program(STUCK.format(more=handling))
    started.line()
    started.kill(signal.SIGUSR2)
    time.sleep(0.2)
    started.kill(signal.SIGTERM)
    assert started.line() == "15"


STARTER = """
import subprocess, sys, time
from nemo_care.process import ending
code = sys.argv[1] if len(sys.argv) > 1 else {code!r}
with ending.starting(lambda number: None):
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    print(child.pid, flush=True)
    time.sleep(600)
"""
BORN_LATE = """
import time
time.sleep(1)
from nemo_care.process import ending
ending.watch_run()
time.sleep(600)
"""


@pytest.mark.parametrize("code", [STUCK.format(more=""), BORN_LATE], ids=["stuck", "starting"])
def test_what_a_killed_starter_has_started_ends(program, code):
    starter = program(STARTER.format(code=code))
    child = int(starter.line())
    grandchild = int(starter.line()) if code is not BORN_LATE else child
    starter.kill(signal.SIGKILL)
    assert gone(child)
    assert gone(grandchild)


def test_runs_of_a_killed_comparison_end(program, tmp_path):
    code = f"""
from pathlib import Path
from nemo_care.experiments.processes import Job, run_jobs
command = [{sys.executable!r}, "-c", {STUCK.format(more="")!r}]
run_jobs([Job("one", command, Path({str(tmp_path)!r}, "log"))], 1, tick=print, done=print)
"""
    comparison = program(code)
    deadline = time.monotonic() + PATIENCE
    log = tmp_path / "log"
    while not (log.exists() and log.read_text().strip()) and time.monotonic() < deadline:
        time.sleep(0.02)
    (run,) = psutil.Process(comparison.process.pid).children()
    comparison.kill(signal.SIGKILL)
    assert gone(run.pid)
    assert gone(int(log.read_text().split()[0]))


def test_a_note_of_the_starters_death_is_bounded(program):
    """A step that does not end, because the other ranks are gone, is left."""
    noting = """
from nemo_care.ranks import stop_request
stop_request._ORPHAN_SECONDS = 1.0
stop_request.StopRequest().catch_signals()
"""
    starter = program(STARTER.format(code=STUCK.format(more=noting)))
    pids = [int(starter.line()), int(starter.line())]
    starter.kill(signal.SIGKILL)
    assert all(gone(pid) for pid in pids)


def test_the_starter_of_a_rank_is_not_that_of_what_the_rank_starts(program):
    """A reward function may run a command of its own."""
    inner = "import os; print(os.environ.get('NEMO_CARE_STARTER'), flush=True)"
    code = f"""
import subprocess, sys, time
from nemo_care.process import ending
ending.watch_run()
time.sleep(0.2)
subprocess.run([sys.executable, "-c", {inner!r}])
time.sleep(600)
"""
    starter = program(STARTER.format(code=code))
    child = int(starter.line())
    assert starter.line() == "None"
    os.kill(child, signal.SIGKILL)


UNWINDS = """
import threading, time
from concurrent.futures import ThreadPoolExecutor
from nemo_care.process import ending
from nemo_care.ranks.launch import guarded

def work():
    pool = ThreadPoolExecutor(1)
    pool.submit(time.sleep, 600)
    try:
        print("ready", flush=True)
        time.sleep(600)
    finally:
        print("tidied", flush=True)

ending.watch(2)
{more}
status = guarded(work)
time.sleep({left})
ending.leave(status)
"""
LATE = """
act = ending._Watch._act
ending._Watch._act = lambda self, number: (time.sleep(0.3), act(self, number))
"""


@pytest.mark.parametrize(("more", "left"), [("", 0), (LATE, 1)], ids=["at_once", "late"])
def test_ctrl_c_tidies_a_command_up_and_waits_for_no_thread(program, more, left):
    """Also where the thread that watches hears of the signal after the main thread has."""
    started = program(UNWINDS.format(more=more, left=left))
    started.line()
    started.kill(signal.SIGINT)
    assert started.line() == "tidied"
    assert started.end() == (130, "nemo-care: interrupted\n")


def test_signals_are_handled_as_soon_as_the_thread_runs(monkeypatch):
    handled = []

    class Noting(threading.Thread):
        def start(self):
            handled.extend(signal.getsignal(number) for number in ending.ASKING)
            super().start()

    monkeypatch.setattr(threading, "Thread", Noting)
    with ending.starting(lambda number: None):
        assert handled == [ending._heard] * len(ending.ASKING)


def test_starting_leaves_the_process_as_it_was():
    before = [signal.getsignal(number) for number in ending.ASKING]
    with ending.starting(lambda number: None):
        assert os.environ[ending.STARTER.name] == str(os.getpid())
    assert [signal.getsignal(number) for number in ending.ASKING] == before
    assert ending.STARTER.name not in os.environ
    assert ending._watch is None
