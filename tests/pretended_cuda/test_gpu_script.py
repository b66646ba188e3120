"""tests/gpu/run_all.sh reaches its end, and what it runs passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[1] / "gpu" / "run_all.sh"


def test_the_gpu_script_reaches_its_end(pretended_environment, tmp_path):
    """Without TransformerEngine, which is not installed: the script says so."""
    out = tmp_path / "results"
    settings = {
        "PYTHON": sys.executable,
        "WHEELS": "NONE",
        "OUT": str(out),
        "BENCHMARK": "--shape tiny --prompt 256 --completion 32 --group 2 --repeats 1",
    }
    done = subprocess.run(
        [str(SCRIPT)],
        env={**pretended_environment, **settings},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    _, _, end = done.stdout.rpartition(f"results: {out}")
    left_out = [line for line in end.splitlines() if line.startswith("left out: ")]
    assert any("TransformerEngine" in line for line in left_out)
    tests = (out / "tests.log").read_text()
    assert " passed" in tests
    assert " failed" not in tests
    benchmark = json.loads((out / "benchmark.json").read_text())
    assert [row["way"] for row in benchmark["rows"]] == [
        "separate, local, bf16",
        "packed, local, bf16",
    ]
    assert all(row["device"] == "pretended H100" for row in benchmark["rows"])
    assert all(row["planned_bytes"] > 0 for row in benchmark["rows"])
    assert (out / "doctor.json").is_file()
