"""The speed of one recipe at several sizes, from what its runs wrote."""

import json
import subprocess
from pathlib import Path

import pytest

from nemo_care.cli import main
from nemo_care.errors import InputError
from nemo_care.reporting.scaling import sizes_of
from nemo_care.runs.reader import read_run

RECIPE = """
trainer: {{devices: 8, num_nodes: {nodes}}}
algorithm: {{prompts_per_step: 32, group_size: 4}}
"""


def write_run(folder: Path, nodes: int, seconds: float, steps: int = 4) -> Path:
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(RECIPE.format(nodes=nodes))
    records = [
        {
            "step": step,
            "rollout/prompt_tokens": 600.0,
            "rollout/completion_tokens": 100.0,
            # The first step is slow and must not count.
            "timing/step": seconds if step > 1 else 100.0,
            "timing/rollout": seconds / 2,
            "timing/reward": 0.0,
            "timing/scoring": seconds / 8,
            "timing/update": seconds / 4,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return folder


def test_tokens_per_gpu_and_efficiency_follow_from_lengths_and_times(tmp_path):
    runs = [
        read_run(write_run(tmp_path / str(nodes), nodes, seconds))
        for nodes, seconds in ((2, 5.0), (1, 8.0))
    ]
    small, large = sizes_of(runs).to_dict("records")
    assert (small["GPUs"], large["GPUs"]) == (8, 16)
    assert small["tokens"] == 32 * (600 + 4 * 100)
    assert small["tokens/s per GPU"] == 32_000 / 8 / 8
    assert large["tokens/s"] == 6_400
    assert (small["efficiency"], large["efficiency"]) == (1.0, pytest.approx(0.8))
    phases = ("rollout", "reward", "scoring", "update", "other")
    assert [small[f"{phase} (s)"] for phase in phases] == [4.0, 0.0, 1.0, 2.0, 1.0]


def test_the_page_needs_no_other_file_and_the_table_is_printed(tmp_path, capsys):
    runs = [write_run(tmp_path / "runs" / str(nodes), nodes, 8 / nodes) for nodes in (2, 1)]
    assert main(["report", "--scaling", *map(str, runs)]) == 0
    printed = capsys.readouterr().out.splitlines()
    # Smallest first, whatever the order of the arguments.
    assert printed[1].startswith("1 | 1 | 8 | 4 | 4,000 | 500.0 | 100% | 8.00 | 4.00")
    assert printed[2].startswith("2 | 2 | 16 | 4 | 8,000 | 500.0 | 100% | 4.00 | 2.00")
    page = Path(printed[3])
    assert page == tmp_path / "runs/scaling.html"
    text = page.read_text()
    assert "data:image/png;base64," in text
    assert 'src="http' not in text
    assert (tmp_path / "runs/scaling.png").stat().st_size > 10_000


def test_runs_that_can_not_be_measured_are_named(tmp_path):
    with pytest.raises(InputError, match="1 steps so far; a comparison needs at least 2"):
        sizes_of([read_run(write_run(tmp_path / "short", 1, 8.0, steps=1))])
    run = write_run(tmp_path / "old", 1, 8.0)
    text = (run / "metrics.jsonl").read_text().replace("rollout/prompt_tokens", "gone")
    (run / "metrics.jsonl").write_text(text)
    with pytest.raises(InputError, match=r"no rollout/prompt_tokens; run it again"):
        sizes_of([read_run(run)])


def test_several_runs_need_the_option():
    with pytest.raises(SystemExit) as stopped:
        main(["report", "a", "b"])
    assert stopped.value.code == 2


def test_each_size_is_submitted_with_its_nodes_and_batch(tmp_path):
    script = Path(__file__).parents[2] / "slurm/scaling.sh"
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "$@" >> "$CALLS"; echo 17\n')
    (tmp_path / "sbatch").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "CALLS": str(tmp_path / "calls"),
        "NEMO_CARE_PROMPTS_PER_NODE": "8",
        "NEMO_CARE_SPARE_NODES": "1",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(script), *arguments],
            env=environment, cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = run("2", "4", "--", "--partition=gpu", "--", "trainer.seed=3")
    assert done.returncode == 0, done.stderr
    assert f"nemo-care report --scaling {tmp_path}/runs/scaling/2" in done.stdout
    first, second = (tmp_path / "calls").read_text().splitlines()
    for call, nodes in ((first, 2), (second, 4)):
        words = call.split()
        assert {"--partition=gpu", f"--nodes={nodes + 1}", "trainer.seed=3"} <= set(words)
        assert f"algorithm.prompts_per_step={8 * nodes}" in words
        assert words[-1] == f"exp_manager.explicit_log_dir={tmp_path}/runs/scaling/{nodes}"
    assert run("four").returncode == 2
    assert run().returncode == 2
