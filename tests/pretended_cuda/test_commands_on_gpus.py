"""The commands on two GPUs: train, resume in another layout, export, evaluate."""

import json
import subprocess
import sys

import pytest
from made_commands import world_overrides
from records import lines

pytestmark = pytest.mark.slow

# The tiny model is not accurate in bf16.
BOUND = 0.05


@pytest.fixture
def run(pretended_environment, tmp_path):
    """Run a command as a person types it."""

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "nemo_care", *map(str, arguments)],
            env=pretended_environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr
        return done.stdout

    return run


def test_training_resuming_exporting_and_evaluating(run, world, tmp_path):
    """Two steps with TP2, sequence parallelism and offloading, the third with PP2.

    Both sample by replayed graphs. That rollout and update agree on log-probabilities shows that
    replays, the other layout and the resumed weights compute the same.
    """
    folder = tmp_path / "run"
    recipe = [
        *("--config-name", "tiny_cpu", "model.precision.dtype=bf16"),
        *("algorithm.group_size=4", "algorithm.prompts_per_step=4"),
        *("algorithm.groups_per_micro_batch=2", "algorithm.reference.ema_update_every=1"),
        *("rollout.groups_per_batch=3", "rollout.cuda_graphs=true"),
        f"rollout.max_logprob_difference={BOUND}",
        f"algorithm.reference.max_logprob_difference={2 * BOUND}",
        *("checkpoint.save_interval=2", "data.validation.samples_per_level=4"),
        *world_overrides(world),
    ]
    training = ["train", *recipe, "trainer.devices=2", f"exp_manager.explicit_log_dir={folder}"]
    offload = ["optimizer.offload=true", "algorithm.reference.offload=true"]
    tensor = ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"]
    run(*training, *offload, *tensor, "trainer.max_steps=2")
    run(*training, *offload, "model.pipeline_model_parallel_size=2", "trainer.max_steps=3")
    steps = lines(folder / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["train/bad_step"] == 0
        assert step["train/grad_norm"] > 0
        assert step["rollout/logprob_difference"] <= BOUND
    run("export", folder, tmp_path / "exported")
    evaluation = [f"evaluation.checkpoint={tmp_path / 'exported'}", "evaluation.judge=likelihood"]
    run("evaluate", *recipe, *evaluation, f"exp_manager.explicit_log_dir={tmp_path / 'evaluated'}")
    found = json.loads((tmp_path / "evaluated" / "evaluation.json").read_text())
    assert [level["count"] for level in found.values()] == [4, 4, 4]
    assert all(level["format_rate"] == 1 for level in found.values())
