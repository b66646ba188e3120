"""`nemo-care replay`: a step that was left out is computed again and says what is not finite."""

import json
import math
import shutil
from copy import deepcopy

import pytest
import torch
from bad_numbers import inject_at
from safetensors.torch import load_file, save_file
from small_runs import small_recipe, small_trainer

from nemo_care.recipe.compose import read_recipe
from nemo_care.recipe.schema import recipe_yaml


@pytest.fixture(scope="module")
def trained(checkpoint, world, ranks, tmp_path_factory):
    """A run whose step 2 was left out, with its recipe."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 3
    recipe.checkpoint.save_interval = 1
    trainer = small_trainer(recipe, ranks, folder)
    inject_at(trainer, {2: "loss"})
    trainer.fit()
    return folder, recipe


@pytest.fixture
def run(checkpoint, trained, tmp_path):
    """Makes a copy of that run; `name` of the weights, if given, is broken from the start.

    Its checkpoint is that of step 1.
    """

    def make(name: str | None = None):
        start = tmp_path / "checkpoint"
        shutil.copytree(checkpoint, start)
        folder, recipe = trained
        shutil.copytree(folder, tmp_path / "run")
        recipe = deepcopy(recipe)
        recipe.model.hf_path = str(start)
        recipe.exp_manager.explicit_log_dir = str(tmp_path / "run")
        (tmp_path / "run" / "recipe.yaml").write_text(recipe_yaml(recipe))
        if name is not None:
            weights = load_file(start / "model.safetensors")
            weights[name].view(-1)[0] = math.nan
            save_file(weights, start / "model.safetensors", metadata={"format": "pt"})
            shutil.rmtree(tmp_path / "run" / "checkpoints")
        return tmp_path / "run"

    return make


@pytest.fixture
def replayed(rank_server):
    return lambda run, *arguments: rank_server.run(["-m", "nemo_care", "replay", run, *arguments])


def test_replay_with_the_weights_of_the_step_finds_them_in_order(run, replayed):
    folder = run()
    # As if engines on other machines had sampled, of which a replay needs none.
    file = folder / "recipe.yaml"
    recipe = read_recipe(file)
    recipe.rollout.backend, recipe.rollout.asynchronous = "vllm", True
    recipe.rollout.vllm.placement, recipe.rollout.vllm.engines = "separate", 2
    recipe.rollout.vllm.ray_address = "node17:6379"
    file.write_text(recipe_yaml(recipe))
    # An id may say what the report says, and what a terminal obeys.
    about = folder / "bad_steps" / "step_000002.json"
    record = json.loads(about.read_text())
    record["groups"][0]["sample_id"] = "train_ where is it now finite \x1b[2J"
    about.write_text(json.dumps(record))
    result = replayed(folder, "--step", "2")
    assert result.returncode == 0, result.stderr
    assert "\x1b" not in result.stdout
    assert "weights: checkpoints/step_000001, as in the step itself (1 optimizer" in result.stdout
    assert "the loss (first on rank 0, replica 0)" in result.stdout
    assert result.stdout.count("then not finite: policy") == 16
    assert result.stdout.count("sample train_") == 4
    assert "now not finite" not in result.stdout
    assert "everything is finite now" in result.stdout
    assert "gradient norm of the whole step: nan" not in result.stdout


@pytest.mark.slow
def test_replay_in_two_ranks_names_the_module_and_says_whose_weights_these_are(run, replayed):
    folder = run("model.layers.1.post_attention_layernorm.weight")
    result = replayed(folder, "--step", "2", "trainer.devices=2")
    assert result.returncode == 0, result.stderr
    out = result.stdout
    assert "those that the run started from, after 0 optimizer steps; the failed step used" in out
    assert "after 1, which no checkpoint has" in out
    assert out.count("now not finite: policy") == 16
    for rank in (0, 1):
        layer = "language_model.decoder.layers.1"
        assert (
            f"first output that is now not finite: {layer}.pre_mlp_layernorm (rank {rank})" in out
        )
        assert f"parameters of rank {rank}, nearest to the output: " in out
    assert "weights not finite on rank 0: 1, the first " in out
    assert "gradient norm of the whole step: nan" in out
    assert "everything is finite now" not in out


def test_replay_refuses_a_step_that_was_not_left_out_and_unknown_keys(run, replayed):
    folder = run()
    result = replayed(folder, "--step", "1")
    assert result.returncode == 2
    assert "step 1 was not left out; steps left out in this run: 2" in result.stderr
    result = replayed(folder, "--step", "2", "trainer.device=1")
    assert result.returncode == 2
    assert "trainer.device" in result.stderr
    assert "Traceback" not in result.stderr


def test_stored_groups_come_back_as_they_were(run, checkpoint, ranks):
    from nemo_care.groups.files import StoredGroup, read_groups, restore_groups

    _, stored = read_groups(run() / "bad_steps" / "step_000002.json")

    class Made:
        def __init__(self, item):
            self.token_ids = item.tensors["prompt_token_ids"]
            self.index = item.prompt_index
            self.sample = type("Sample", (), {"sample_id": item.record["sample_id"]})

    prompts = {item.prompt_index: Made(item) for item in stored}
    groups = restore_groups(stored, prompts.__getitem__)
    for item, group in zip(stored, groups, strict=True):
        assert group.size == 4
        again = StoredGroup.of(group, None)
        for key, tensor in again.tensors.items():
            torch.testing.assert_close(tensor, item.tensors[key], rtol=0, atol=0, equal_nan=True)
