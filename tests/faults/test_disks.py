"""Disks that fill up or change what was written: older checkpoints stay, and the run says so."""

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_runs import Run, assert_equal_runs

MIB = 1 << 20


def truncate(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)


def flip_a_bit(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        (byte,) = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))


# Slow: test_checkpoints.py damages checkpoints of runs in one process.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "said"), [(truncate, "bytes were written"), (flip_a_bit, "content changed")]
)
def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    run: Run, undisturbed, report, damage, said
):
    fault = {"kind": "kill", "rank": 0, "phase": "rollout", "step": 5}
    run.start("one", "checkpoint.asynchronous=false", fault=fault).wait()
    assert run.checkpoints() == [2, 4]
    shard = max(
        (run.folder / "checkpoints/step_000004").glob("*.distcp"), key=lambda f: f.stat().st_size
    )
    damage(shard)
    seconds = run.finish("one")
    output = run.output()
    assert "resumed after step 2 from" in output
    assert str(shard) in output
    assert all(word in output for word in said.split())
    assert_equal_runs(run, undisturbed("one"))
    what = damage.__name__.replace("_", " ")
    report(
        f"{what}: a shard of step 4",
        "named, set aside; goes on after step 2",
        "steps 3 to 5",
        seconds,
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB, of which checkpoints take about a fourth."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24M", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip(
            "no file system can be mounted here; test_checkpoints.py has a write that fails"
        )
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.slow  # test_checkpoints.py has a write that fails on one of two ranks
def test_full_disk_ends_the_run_with_one_sentence_and_its_checkpoints(
    run: Run, undisturbed, report, small_disk
):
    run.folder = small_disk / "run"
    # What is left is enough for one checkpoint, and not for two; whatever is written meanwhile, the
    # checkpoint or the records of a step, meets the end first.
    (small_disk / "filler").write_bytes(bytes(16 * MIB))
    assert run.start("DP 2").wait() == [1, 1], run.output()
    output = run.output()
    (sentence, *_) = re.findall(r"^nemo-care: .*No space left on device.*$", output, re.MULTILINE)
    assert "could not be written to" in sentence
    assert "repeat the command: it resumes from the newest" in sentence
    assert "Traceback" not in output
    (small_disk / "filler").unlink()
    saved = run.checkpoints()[-1]
    seconds = run.finish("DP 2")
    assert f"resumed after step {saved} from" in run.output()
    assert_equal_runs(run, undisturbed("DP 2"))
    report(
        "disk full while saving",
        "exit status 1, older ones intact",
        f"steps since {saved}",
        seconds,
    )
