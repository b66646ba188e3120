"""A directory belongs to one process at a time, and to none as soon as that process is gone."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from nemo_care.errors import InputError
from nemo_care.runs.lock import LOCK, run_lock

HOLDER = """
import sys, time
from pathlib import Path
from nemo_care.runs.lock import run_lock
with run_lock(Path(sys.argv[1]), "train"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the directory."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_learns_who_holds_the_directory(tmp_path, holder):
    for _ in range(2):
        with pytest.raises(InputError) as refused, run_lock(tmp_path, "evaluate"):
            pass
    message = str(refused.value)
    assert message.startswith(f"{tmp_path} is in use by nemo-care train on {socket.gethostname()} ")
    assert f"(process {holder.pid}, since {time.strftime('%Y-%m-%dT')}" in message
    assert "exp_manager.explicit_log_dir" in message
    assert "\n" not in message


def test_the_lock_of_a_killed_process_is_free(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with run_lock(tmp_path, "train"):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_what_a_holder_starts_does_not_hold_on(tmp_path):
    """Neither a program nor a forked process, such as those that decode and serve."""
    with run_lock(tmp_path, "train"):
        program = subprocess.Popen(["sleep", "60"], close_fds=False)
        forked = os.fork()
        if forked == 0:
            time.sleep(60)
            os._exit(0)
    try:
        # The child closes what it got as its first act.
        deadline = time.monotonic() + 10
        while True:
            try:
                with run_lock(tmp_path, "train"):
                    break
            except InputError:
                assert time.monotonic() < deadline
    finally:
        os.kill(forked, signal.SIGKILL)
        os.waitpid(forked, 0)
        program.kill()
        program.wait()


def test_a_lock_that_is_removed_while_it_is_opened_is_taken_anew(tmp_path, monkeypatch):
    """Between another's opening and locking the holder may end and remove its file."""
    lock, calls = fcntl.flock, []

    def removed_first(descriptor, how):
        if not calls:
            (tmp_path / LOCK).unlink()
        calls.append(how)
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with run_lock(tmp_path, "train"):
        assert len(calls) == 2
        with pytest.raises(InputError, match="in use"), run_lock(tmp_path, "train"):
            pass


def test_without_locks_a_process_of_this_machine_is_noticed_and_others_warned_of(
    tmp_path, monkeypatch, capsys
):
    def unsupported(descriptor, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with run_lock(tmp_path, "train"):
        assert f"warning: the file system of {tmp_path} has no locks" in capsys.readouterr().err
    holder = {"command": "train", "host": socket.gethostname(), "pid": os.getppid(), "since": ""}
    (tmp_path / LOCK).write_text(json.dumps(holder))
    with (
        pytest.raises(InputError, match=rf"train on .*\(process {os.getppid()},"),
        run_lock(tmp_path, "train"),
    ):
        pass
    # Left by this process's own number, in a container that was started again.
    (tmp_path / LOCK).write_text(json.dumps({**holder, "pid": os.getpid()}))
    with run_lock(tmp_path, "train"):
        pass
    # Left by a process that is gone.
    gone = subprocess.Popen(["true"])
    gone.wait()
    holder = {"command": "train", "host": socket.gethostname(), "pid": gone.pid, "since": ""}
    (tmp_path / LOCK).write_text(json.dumps(holder))
    with run_lock(tmp_path, "train"):
        pass
