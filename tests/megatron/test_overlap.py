"""Summing gradients while backward runs changes no result."""

import pytest
import torch
from layouts import LAYOUTS, gather_weights, share_of
from made_groups import make_groups, make_prompts
from small_runs import small_recipe, small_trainer, updated


def two_steps(ranks, job) -> dict:
    """By whether sums overlap: norms, weights and average."""
    folder, checkpoint, world, groups = job
    result = {}
    for overlap in (False, True):
        recipe = small_recipe(checkpoint, world)
        recipe.optimizer.overlap_grad_reduce = overlap
        trainer = small_trainer(recipe, ranks, folder / str(overlap))
        norms = []
        for step in (1, 2):
            mine = share_of(groups, ranks)
            trainer.reference.score_answers(mine)
            trainer.credit(mine)
            norms.append(updated(trainer.policy, mine)["train/grad_norm"])
            trainer.reference.track(trainer.policy.model, step)
        weights, average = (
            gather_weights(model)
            for model in (trainer.policy.model, trainer.reference.average.model)
        )
        result[overlap] = {"norms": norms, "weights": weights, "average": average}
    return result


@pytest.mark.parametrize("name", ["dp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_overlapping_sums_give_the_same_steps(on_ranks, name, checkpoint, world, tmp_path):
    # Both have videos: every parameter gets a gradient.
    groups = make_groups(make_prompts(checkpoint, world, tmp_path)[:2], checkpoint)
    layout, replicas = LAYOUTS[name]
    job = (tmp_path, checkpoint, world, groups)
    for result in on_ranks(layout, two_steps, job, replicas=replicas):
        assert result[True]["norms"] == pytest.approx(result[False]["norms"], rel=1e-6)
        assert result[True]["norms"][0] > 0
        for kind in ("weights", "average"):
            for key, tensor in result[False][kind].items():
                torch.testing.assert_close(result[True][kind][key], tensor, atol=1e-6, rtol=1e-5)
