"""The benchmarks run; what they measure is not judged here."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words"),
    [("scoring.py", ("fused", "separate", "naive")), ("step.py", ("shared", "copied", "ratio"))],
)
def test_benchmark_runs_and_prints_its_ratios(script, words):
    arguments = ["--sizes", "256,16,2", "--threads", "1", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for word in words:
        (line,) = [line for line in done.stdout.splitlines() if f"  {word} " in line]
        assert line.split()[:3] == ["256", "16", "2"]
