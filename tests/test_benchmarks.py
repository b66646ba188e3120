"""The benchmarks run; what they measure is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.slow
def test_benchmark_of_the_vision_tower_counts_half_of_the_work_on_two_ranks():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "vision.py"), "--ranks", "2", "--prompt", "256", "--repeats",
         "1"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("    2 ")]
    assert [row[1] for row in rows] == ["replicated", "dealt"]
    assert [float(row[-1]) for row in rows] == [1.0, 0.5]
    runs = [line.split("|")[2].strip() for line in done.stdout.splitlines() if "|" in line]
    assert runs[-3:] == ["3", "1", "1"]


@pytest.mark.slow
def test_benchmark_for_gpus_runs_on_a_cpu_with_a_tiny_shape(tmp_path):
    out = tmp_path / "out.json"
    size = ["--layers", "2", "--prompt", "512", "--completion", "32", "--group", "2"]
    done = subprocess.run(
        [sys.executable, str(FOLDER / "gpu.py"), "--shape", "tiny", *size, "--repeats", "1",
         "--fp8-recipes", "tensorwise", "--out", str(out)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record == json.loads(done.stdout.splitlines()[-1])
    separate, packed = record["rows"]
    assert separate["update"]["flops"] > packed["update"]["flops"]
    assert separate["planned_bytes"] > packed["planned_bytes"] > 0
    if not torch.cuda.is_available():
        assert packed["measured_bytes"] is None
        assert len(record["left_out"]) == 2
        assert "not measured" in done.stdout


def test_table_of_the_benchmark_for_gpus_compares_with_separate_sequences(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import gpu

    def row(way: str, seconds: float, measured: int | None):
        found = {"seconds": seconds, "tokens_per_second": 100.0, "flops": 1.0, "mfu": 0.4}
        memory = {"planned_bytes": 11 * gpu.GIB, "measured_bytes": measured}
        return {"way": way, "scoring": found, "update": found, **memory}

    rows = [row("separate, local, bf16", 4.0, None), row("packed, local, bf16", 1.0, 10 * gpu.GIB)]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in gpu.table(rows)]
    assert {len(line) for line in lines} == {9}
    assert lines[3][5:] == ["1.00", "11.00 GiB", "not measured", "–"]
    assert lines[5] == [
        "packed, local, bf16", "update", "1.000", "100", "40.0%", "4.00", "11.00 GiB", "10.00 GiB",
        "+10.0%",
    ]  # fmt: skip
