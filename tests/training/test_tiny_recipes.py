"""The recipes that train the tiny models of other families than the first."""

import pytest
from made_commands import world_overrides
from records import lines
from small_runs import small_trainer

from nemo_care.recipe.compose import compose_recipe


@pytest.mark.parametrize("name", ["tiny_cpu_qwen3_vl", "tiny_cpu_qwen3_vl_moe"])
def test_the_warm_started_model_of_a_recipe_answers_and_trains(name, ranks, world, tmp_path):
    recipe = compose_recipe(
        [
            *("--config-name", name, *world_overrides(world)),
            *("trainer.max_steps=2", "algorithm.prompts_per_step=4"),
            *("checkpoint.save_interval=1000", "checkpoint.export=false"),
        ]
    )
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    trainer.fit()
    steps = lines(tmp_path / "metrics.jsonl")
    assert len(steps) == 2
    for step in steps:
        assert step["reward/format"] > 0.9
        assert step["reward/accuracy"] > 0.3
        assert step["train/grad_norm"] > 0
