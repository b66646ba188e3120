"""Disks that are full and places that can't be written are one line, in every command."""

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from made_commands import world_overrides
from safetensors.torch import save_file

from nemo_care.cli import main
from nemo_care.errors import InputError
from nemo_care.files.json_lines import append_lines, replace_file
from nemo_care.process.os_errors import naming
from nemo_care.ranks.launch import guarded
from nemo_care.ranks.open_files import allow_open_files

REPOSITORY = Path(__file__).parents[2]
FULL = Path("/dev/full")


@pytest.fixture
def run(capfd):
    """Run a command line in this process; gives its status and the line that it ends with."""

    def run(*arguments: object) -> tuple[int, str]:
        status = main([str(argument) for argument in arguments])
        err = capfd.readouterr().err
        assert "Traceback" not in err
        (line,) = [line for line in err.splitlines() if line.startswith("nemo-care: ")]
        return status, line

    return run


@pytest.fixture
def run_directory(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 0.5}) + "\n")
    return folder


def test_a_report_on_a_full_disk(run, run_directory):
    main(["report", str(run_directory)])
    # The pictures are written before the page.
    for name in ("report.html", "report/training.png"):
        file = run_directory / name
        file.unlink()
        file.symlink_to(FULL)
        status, line = run("report", run_directory)
        assert status == 1
        assert line.startswith(f"nemo-care: {file}: No space left on device; make room on that")


def test_a_report_where_no_folder_can_be_made(run, run_directory):
    (run_directory / "report").write_text("a file")
    status, line = run("report", run_directory)
    assert status == 2
    assert line.startswith(f"nemo-care: {run_directory / 'report'}: File exists; choose another")


def test_a_miniature_where_no_folder_can_be_made(run, tmp_path):
    (tmp_path / "file").write_text("")
    status, line = run("miniature", "data", tmp_path / "file/world", "--train", 1)
    assert status == 2
    assert f"{tmp_path}/file" in line
    assert "choose another place" in line


def test_a_data_check_whose_report_finds_no_room(run, world, tmp_path):
    out = tmp_path / "out.json"
    out.with_name("out.json.partial").symlink_to(FULL)
    status, line = run(
        *("data", "check", "--config-name", "tiny_cpu", "--workers", 0, "--limit", 1),
        *("--out", out, *world_overrides(world)),
    )
    assert status == 1
    assert line.startswith(f"nemo-care: {out}: No space left on device")


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_a_run_directory_that_can_not_be_made(rank_server, world, tmp_path, command):
    """In a process of its own: a rank stays one for the rest of its life."""
    (tmp_path / "file").write_text("")
    done = rank_server.run(
        [
            *("-m", "nemo_care", command, "--config-name", "tiny_cpu", *world_overrides(world)),
            f"exp_manager.explicit_log_dir={tmp_path}/file/run",
        ]
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"nemo-care: {tmp_path}/file/run" in done.stderr
    assert "Not a directory; choose another " in done.stderr


def test_output_that_finds_no_room_or_no_reader(tmp_path):
    program = "import sys; from nemo_care.ranks.launch import guarded; sys.exit(guarded(print, 1))"
    command = [sys.executable, "-c", program]
    # What is printed waits in a buffer, as it does for users.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with FULL.open("w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment
        )
    assert done.returncode == 1
    assert done.stderr == "nemo-care: the output can't be written: No space left on device\n"
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    process.stdout.close()  # as head does
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_writing_names_the_file(tmp_path):
    file = tmp_path / "lines.jsonl"
    file.symlink_to(FULL)
    with pytest.raises(OSError, match=r"No space left on device: .*lines\.jsonl"):
        append_lines(file, [{"a": 1}])
    (tmp_path / "whole.partial").symlink_to(FULL)
    with pytest.raises(OSError, match=r"No space left on device: .*whole'"):
        replace_file(tmp_path / "whole", "text")
    file = tmp_path / "lines.jsonl" / "model.safetensors"
    with pytest.raises(NotADirectoryError) as raised, naming(file):
        save_file({}, file)
    assert raised.value.filename == str(file)


def test_a_mistake_of_the_program_keeps_its_traceback(capfd):
    def connect():
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    def divide():
        return 1 / 0

    for mistake in (connect, divide):
        assert guarded(mistake) == 1
        assert f"in {mistake.__name__}" in capfd.readouterr().err


def test_a_low_limit_of_open_files_is_raised_or_refused(monkeypatch):
    limits = (64, 4096)
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    given = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: given.append(limits))
    allow_open_files(1)
    allow_open_files(4)
    assert given == [(256, 4096), (271, 4096)]
    limits = (64, 64)
    with pytest.raises(InputError, match=r"64 open files \(ulimit -n\).*ulimit -n 256"):
        allow_open_files(1)
    limits = (1024, 1024)
    allow_open_files(64)
    assert len(given) == 2


@pytest.mark.slow  # the test before has the limits
def test_a_run_under_ulimit_64_is_one_line(world, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "nemo_care.cli", "train", "--config-name", "tiny_cpu"),
            *("trainer.devices=2", *world_overrides(world)),
            f"exp_manager.explicit_log_dir={tmp_path}/run",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=REPOSITORY,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)),
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("nemo-care: this process can have 64 open files")
