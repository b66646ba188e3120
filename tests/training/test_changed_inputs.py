"""A resumed run notices other data, and refuses another model than its checkpoint's."""

import json
import re
import shutil

import pytest
from small_runs import small_recipe, small_trainer

from nemo_care.errors import InputError


@pytest.fixture
def recipe(checkpoint, world, tmp_path):
    """A recipe whose data may be changed."""
    recipe = small_recipe(checkpoint, shutil.copytree(world, tmp_path / "world"))
    recipe.trainer.max_steps = 1
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    return recipe


@pytest.fixture(scope="module")
def run_of_one_step(checkpoint, world, ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 1
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    small_trainer(recipe, ranks, folder).fit()
    return folder


@pytest.fixture
def begun(run_of_one_step, tmp_path):
    """A run of this test's own, with a checkpoint of its one step."""
    return shutil.copytree(run_of_one_step, tmp_path / "run")


def repeat_first_line(file):
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines, lines[0]]))


def test_changed_annotations_are_reported_once_when_a_run_goes_on(
    recipe, ranks, begun, tmp_path, capsys
):
    recipe.trainer.max_steps = 2
    changed = {
        "train.jsonl": ["(training data)", "48 lines then, 49 now", "order of the prompts"],
        "validation_L1.jsonl": ["(validation data)", "8 lines then, 9 now", "can't be compared"],
    }
    for name in changed:
        repeat_first_line(tmp_path / "world" / name)
    small_trainer(recipe, ranks, begun).fit()
    told = [line for line in capsys.readouterr().out.splitlines() if "changed since" in line]
    for line, (name, parts) in zip(told, changed.items(), strict=True):
        assert line.startswith(str(tmp_path / "world" / name))
        for part in parts:
            assert part in line
    # The checkpoint of step 2 was made with the new files.
    small_trainer(recipe, ranks, begun).resume()
    assert "changed since" not in capsys.readouterr().out


def test_the_same_annotations_and_those_of_a_changed_recipe_are_no_change(
    recipe, ranks, begun, capsys
):
    """Copied elsewhere, the content is the same."""
    recipe.data.validation.annotations = {"L2": "validation_L2.jsonl"}
    small_trainer(recipe, ranks, begun).resume()
    assert "changed since" not in capsys.readouterr().out


def test_a_reference_that_the_run_began_without_is_refused(recipe, ranks, tmp_path):
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    small_trainer(recipe, ranks, tmp_path / "run").fit()
    for bonus, kl in ((0.5, 0.0), (0.0, 0.04)):
        recipe.algorithm.consistency.bonus_coefficient = bonus
        recipe.algorithm.kl_coefficient = kl
        with pytest.raises(InputError, match=r"began without a reference.*set both to 0") as raised:
            small_trainer(recipe, ranks, tmp_path / "run").resume()
        assert "\n" not in str(raised.value)


def test_a_reference_that_is_no_longer_needed_is_left(recipe, ranks, begun):
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    resumed = small_trainer(recipe, ranks, begun)
    resumed.resume()
    assert resumed.step == 1


@pytest.fixture
def other_models(checkpoint, tmp_path, ranks):
    """Makes checkpoints that differ from the tiny one in a size."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def make(block: str, **sizes: int):
        folder = tmp_path / "other"
        shutil.copytree(checkpoint, folder)
        content = json.loads((folder / "config.json").read_text())
        content[block].update(sizes)
        if "num_hidden_layers" in sizes and "layer_types" in content[block]:
            content[block]["layer_types"] = ["full_attention"] * sizes["num_hidden_layers"]
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**content))
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.mark.parametrize(
    ("block", "sizes"),
    [
        ("text_config", {"num_hidden_layers": 2}),
        ("text_config", {"num_hidden_layers": 6}),
        ("text_config", {"intermediate_size": 96}),
        ("text_config", {"num_key_value_heads": 1}),
        ("vision_config", {"depth": 1}),
    ],
)
def test_another_architecture_is_refused_with_a_tensor_and_both_shapes(
    recipe, ranks, begun, other_models, block, sizes
):
    recipe.model.hf_path = str(other_models(block, **sizes))
    with pytest.raises(InputError) as raised:
        small_trainer(recipe, ranks, begun).resume()
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith(str(begun / "checkpoints/step_000001"))
    assert "not a checkpoint of this architecture" in message
    assert "model.hf_path" in message
    assert re.search(r"is (missing|\(.*?\)) there, and (missing|\(.*\)) in the recipe's", message)
    # It is whole, and stays in its place.
    assert (begun / "checkpoints/step_000001").is_dir()
