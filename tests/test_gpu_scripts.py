"""The scripts of tests/gpu, where there is no GPU: they say so, and change nothing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "gpu"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(FOLDER / script), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True)
    assert done.stdout == ""
    assert len(SCRIPTS) == 2


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS])
def test_help_and_unknown_options(script):
    done = run(script, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: tests/gpu/{script}")
    assert run(script, "--no-such-option").returncode == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_run(tmp_path):
    done = run("run_all.sh", OUT=str(tmp_path / "out"), WHEELS="NONE")
    assert done.returncode == 2
    assert done.stderr.startswith("run_all.sh: torch finds no GPU here")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_an_interpreter_without_torch_is_named(tmp_path):
    done = run("run_all.sh", PYTHON="/bin/false", OUT=str(tmp_path / "out"))
    assert done.returncode == 2
    assert "/bin/false has no torch: set PYTHON" in done.stderr
