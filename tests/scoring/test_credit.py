"""Credit: the recipe's keys reach the formulas, and new kinds need no change of the package."""

import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from small_runs import one_step, small_recipe, small_trainer

from nemo_care.errors import InputError
from nemo_care.groups.group import Group
from nemo_care.objective.advantages import ADVANTAGES
from nemo_care.objective.bonuses import BONUSES, Bonus
from nemo_care.objective.losses import LOSSES, Loss, Mean, clipped_ratio
from nemo_care.recipe.algorithm import AlgorithmConfig, ConsistencyConfig
from nemo_care.recipe.schema import check_recipe
from nemo_care.scoring.credit import Credit
from nemo_care.training.step import Step


def group():
    """Three accurate completions, one of them without an answer, and a wrong one."""
    return SimpleNamespace(
        accuracy=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        base_reward=torch.tensor([2.0, 2.0, 1.0, 1.0]),
        answer_likelihood=torch.tensor([0.5, 0.9, math.nan, 0.8]),
        pair_likelihood=torch.tensor(
            [
                [0.5, 0.5, math.nan, 0.5],
                [0.1, 0.9, math.nan, 0.1],
                [math.nan] * 4,
                [0.8, 0.8, math.nan, 0.8 / math.sqrt(math.e)],
            ]
        ),
    )


@pytest.mark.parametrize(
    ("keys", "bonus"),
    [
        ({}, [0, 0.5, 0, 0]),
        ({"margin": 0.3}, [0.5, 0.5, 0, 0]),
        ({"likelihood_clip": 0.5}, [0.5, 0.5, 0, 0]),
        ({"kind": "accurate"}, [0.5, 0.5, 0, 0]),
        ({"kind": "accurate", "bonus_coefficient": 0.2}, [0.2, 0.2, 0, 0]),
        ({"kind": "accurate", "accuracy_threshold": 1.0}, [0, 0, 0, 0]),
        ({"kind": "dense"}, [0.25, 0.45, 0, 0.4]),
        ({"kind": "dense", "bonus_coefficient": 1.0, "likelihood_clip": 0.6}, [0.5, 0.6, 0, 0.6]),
        ({"kind": "dense", "bonus_coefficient": 0.0}, [0, 0, 0, 0]),
        ({"kind": "counterfactual"}, [0, 0.5, 0, -0.25]),
        ({"kind": "counterfactual", "bonus_coefficient": 1.0}, [0, 1, 0, -0.5]),
        ({"kind": "counterfactual", "counterfactual_share": 0.4}, [0, 0.5, 0, -0.1]),
        ({"kind": "counterfactual", "counterfactual_share": 0.0}, [0, 0.5, 0, 0]),
    ],
)
def test_each_kind_of_bonus_follows_its_keys(keys, bonus):
    made = group()
    Credit(AlgorithmConfig(consistency=ConsistencyConfig(**keys)))([made])
    torch.testing.assert_close(made.consistency_bonus, torch.tensor(bonus, dtype=torch.float32))
    torch.testing.assert_close(made.reward, made.base_reward + made.consistency_bonus)


def test_masked_completions_count_in_the_baseline_and_get_no_advantage():
    made = group()
    ended = (True, False, True, True)
    made.completions = [SimpleNamespace(ended=value) for value in ended]
    kept = group()
    Credit(AlgorithmConfig())([kept])
    Credit(AlgorithmConfig(), masks_truncated=True)([made])
    assert made.advantage[1] == 0 != kept.advantage[1]
    rest = torch.tensor(ended)
    assert torch.equal(made.advantage[rest], kept.advantage[rest])
    assert torch.equal(made.reward, kept.reward)


def likeliest_bonus(inputs, keys):
    """A toy bonus: for the likeliest answer of each group."""
    likelihood = inputs.answer_likelihood.nan_to_num(0)
    return keys.bonus_coefficient * (likelihood == likelihood.amax(dim=-1, keepdim=True)).float()


def centred(rewards):
    """A toy advantage: the distance from the group's mean."""
    return rewards - rewards.mean(dim=-1, keepdim=True)


TOY_MEAN = Mean(
    total=lambda values, mask: (values * mask).sum(), count=lambda mask, longest: mask.sum()
)


@pytest.fixture
def toys(monkeypatch):
    """Kinds that the package does not know."""
    monkeypatch.setitem(BONUSES, "likeliest", Bonus(likeliest_bonus))
    monkeypatch.setitem(ADVANTAGES, "centred", centred)
    monkeypatch.setitem(LOSSES, "toy", Loss(clipped_ratio, TOY_MEAN))


def test_kinds_that_no_table_has_are_refused(checkpoint, world):
    for part, key in (("algorithm", "advantage"), ("algorithm", "loss")):
        recipe = small_recipe(checkpoint, world)
        setattr(getattr(recipe, part), key, "centred")
        with pytest.raises(InputError, match=rf"{part}\.{key}=centred: choose grpo"):
            check_recipe(recipe)


def test_a_bonus_an_advantage_and_a_loss_are_added_without_touching_the_package(
    toys, checkpoint, world, ranks, tmp_path
):
    """A whole step with three kinds that are registered here, against formulas written out here."""
    recipe = small_recipe(checkpoint, world)
    recipe.algorithm.consistency.kind = "likeliest"
    recipe.algorithm.advantage = "centred"
    recipe.algorithm.loss = "toy"
    check_recipe(recipe)
    trainer = small_trainer(recipe, ranks, tmp_path)
    step = one_step(trainer)

    loss, tokens = 0.0, 0
    for group in step.groups:
        likelihood = group.answer_likelihood.nan_to_num(0)
        bonus = 0.5 * (likelihood == likelihood.max()).float()
        torch.testing.assert_close(group.consistency_bonus, bonus)
        reward = group.base_reward + bonus
        torch.testing.assert_close(group.advantage, reward - reward.mean())
        for advantage, completion in zip(group.advantage, group.completions, strict=True):
            loss -= float(advantage) * completion.length
            tokens += completion.length
    assert len({c.length for group in step.groups for c in group.completions}) > 1
    assert step.metrics["train/loss"] == pytest.approx(loss / tokens, abs=1e-6)


def test_each_phase_sets_its_fields_of_a_group_and_no_other(checkpoint, world, ranks, tmp_path):
    trainer = small_trainer(small_recipe(checkpoint, world), ranks, tmp_path)
    groups = trainer.next_rollouts(Step(1))
    with pytest.raises(ValueError, match="set by a phase that has not run"):
        trainer.credit(groups)
    unset = {field.name for field in fields(Group)} - {"prompt", "completions", "staleness"}
    phases = [
        (trainer.rewards, {"rewards", "base_reward"}),
        (trainer.reference.score_answers, {"answer_likelihood", "reference_log_probs"}),
        (trainer.credit, {"consistency_bonus", "reward", "advantage"}),
    ]
    for phase, its in phases:
        assert all(getattr(group, name) is None for group in groups for name in unset)
        phase(groups)
        assert all(getattr(group, name) is not None for group in groups for name in its)
        unset -= its
    # Without a counterfactual bonus, dynamic sampling and experts.
    assert unset == {"pair_likelihood", "used", "prompt_routing"}
    assert all(getattr(group, name) is None for group in groups for name in unset)
