"""The command nemo-care plan: which recipes it compares."""

import json

import pytest

from nemo_care.commands import plan as command
from nemo_care.errors import InputError


@pytest.fixture
def compared(monkeypatch):
    """The variants that the command wants to have compared, and the recipe's own."""
    from nemo_care.planning import rollouts

    found = {}

    def compare(recipes, chosen, question):
        found.update(recipes, chosen=chosen)
        return rollouts.RolloutPlans({}, {}, chosen)

    monkeypatch.setattr(rollouts, "compare_rollouts", compare)
    monkeypatch.setattr(command, "import_lightly", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def ask(*arguments):
        found.clear()
        command.main(["--compare-rollouts", "--json", "--config-name", *arguments])
        return found

    return ask


def test_all_rollouts_of_a_recipe_are_compared(compared, capsys):
    found = compared("grpo_care_qwen2_5_vl_7b", "algorithm.group_size=4")
    assert found.pop("chosen") == "vllm"
    assert {name: recipe.rollout.backend for name, recipe in found.items()} == {
        "megatron": "megatron",
        "vllm": "vllm",
        "vllm_async": "vllm",
    }
    assert {recipe.algorithm.group_size for recipe in found.values()} == {4}
    assert json.loads(capsys.readouterr().out)["chosen"] == "vllm"


def test_a_rollout_given_on_the_command_line_is_the_recipes_own(compared):
    assert compared("grpo_care_qwen2_5_vl_7b", "rollout=megatron")["chosen"] == "megatron"


def test_a_rollout_without_engines_is_compared_as_a_reason(compared):
    found = compared("tiny_cpu")
    assert found["chosen"] == "megatron"
    assert isinstance(found["vllm_async"], InputError)
    assert "rollout.vllm.ray_address" in str(found["vllm_async"])
