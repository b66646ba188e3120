"""Each start of a run says what it was made with, and nothing secret."""

import json
import subprocess
from pathlib import Path

from nemo_care.runs.files import RunFiles
from nemo_care.runs.origin import origin


def test_a_start_names_commit_and_versions(monkeypatch):
    import torch

    monkeypatch.delenv("NEMO_CARE_COMMIT", raising=False)
    checkout = Path(__file__).parents[2]
    head = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    made = origin()
    assert made["commit"] is None if not head else made["commit"].startswith(head)
    assert made["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    monkeypatch.setenv("NEMO_CARE_COMMIT", "abc-dirty")
    assert origin()["commit"] == "abc-dirty"


def test_starts_are_kept_and_hold_no_key(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-key")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    files = RunFiles(tmp_path)
    files.append_start(origin())
    files.append_start(origin())
    text = (tmp_path / "starts.jsonl").read_text()
    assert [json.loads(line)["job"]["SLURM_JOB_ID"] for line in text.splitlines()] == ["17", "17"]
    assert "a-secret-key" not in text
