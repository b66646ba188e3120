"""A rank that dies ends the run with its name and traceback, not with a hang."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

STARTER = """
import sys
from nemo_care.parallel.launch import start_ranks
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
def test_one_dying_rank_ends_all(tmp_path: Path, how: str, status: int, message: str):
    program, starter = tmp_path / "program.py", tmp_path / "starter.py"
    program.write_text(DYING.format(how=how))
    starter.write_text(STARTER)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(starter), str(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status
    assert time.monotonic() - began < 60
    assert message in done.stderr
    if "ValueError" in how:
        assert "ValueError: broken on purpose" in done.stderr


ABORTED = """
import atexit, os
import torch.distributed as dist
from nemo_care.ending import leave
from nemo_care.parallel.launch import guarded

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
