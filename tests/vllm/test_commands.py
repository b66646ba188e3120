"""The commands with rollout.backend=vllm, from the command line to their files."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.vllm

COMMON = [
    "--config-name",
    "tiny_cpu",
    "rollout.vllm.kv_cache_gib=0.25",
    "rollout.vllm.enforce_eager=true",
    "data.validation.samples_per_level=16",
    "evaluation.forced_reasoning_probe=false",
]


def run(command, folder, tmp_path, *keys):
    arguments = [*COMMON, f"exp_manager.explicit_log_dir={tmp_path / folder}", *keys]
    done = subprocess.run(
        [sys.executable, "-m", "nemo_care", command, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return tmp_path / folder


def test_two_ranks_train_and_an_evaluation_equals_that_of_the_training_shards(tmp_path):
    trained = run(
        "train",
        "trained",
        tmp_path,
        "rollout.backend=vllm",
        "trainer.devices=2",
        "model.tensor_model_parallel_size=2",
        "trainer.max_steps=2",
        "algorithm.prompts_per_step=4",
    )
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert all(step["rollout/logprob_difference_max"] < 1e-3 for step in steps)
    assert len((trained / "validation.jsonl").read_text().splitlines()) == 2
    # The trained weights, not those of model.hf_path, and greedy.
    keys = ["evaluation.temperature=0", f"evaluation.checkpoint={trained}"]
    rows = {
        backend: (
            run("evaluate", backend, tmp_path, f"rollout.backend={backend}", *keys)
            / "evaluation.json"
        ).read_text()
        for backend in ("megatron", "vllm")
    }
    assert rows["vllm"] == rows["megatron"]
