"""When the reference follows the policy, and what is said when the bonus no longer selects."""

import pytest
import torch
from small_runs import one_step, small_recipe, small_trainer

from nemo_care.errors import InputError
from nemo_care.models import hf_tensors
from nemo_care.recipe.schema import check_recipe
from nemo_care.training import step_watch


@pytest.fixture
def recipe(checkpoint, world):
    return small_recipe(checkpoint, world)


def moved_in(trainer, selection_rates) -> list[bool]:
    """Whether the reference moved in each step, one after another; the policy always does."""
    moved = []
    for step, rate in enumerate(selection_rates, start=1):
        before = {name: value.clone() for name, value in trainer.reference.average.state.items()}
        with torch.no_grad():
            for parameter in trainer.policy.model.parameters():
                parameter.add_(0.01)
        trainer.reference.track(trainer.policy.model, step, rate)
        after = trainer.reference.average.state
        moved.append(any(not torch.equal(before[name], after[name]) for name in before))
    return moved


def test_reference_follows_every_so_many_steps_after_its_start(recipe, ranks, tmp_path):
    recipe.algorithm.reference.ema_update_every = 2
    trainer = small_trainer(recipe, ranks, tmp_path / "always")
    assert moved_in(trainer, [1.0] * 4) == [False, True, False, True]
    recipe.algorithm.reference.ema_start_step = 2
    trainer = small_trainer(recipe, ranks, tmp_path / "later")
    assert moved_in(trainer, [1.0] * 4) == [False, False, False, True]


def test_the_distance_is_measured_while_the_reference_moves_and_again_where_it_did_not(
    recipe, ranks, tmp_path
):
    recipe.algorithm.reference.ema_update_every = 2
    recipe.algorithm.reference.offload = True
    trainer = small_trainer(recipe, ranks, tmp_path)
    reference, policy = trainer.reference, trainer.policy.model
    measure, measured = reference.average.squared_distance, []
    reference.average.squared_distance = lambda policy: measured.append(policy) or measure(policy)
    distances = []
    # It moves in the second step only.
    for step in (1, 2, 3):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.01)
        reference.track(policy, step)
        squares = measure(policy).sum(0)
        distances.append((reference.distance(policy), float((squares[0] / squares[1]).sqrt())))
    assert len(measured) == 2
    assert all(ours == wanted > 0 for ours, wanted in distances)
    # Asked again, and after loading other weights, nothing old is taken.
    reference.track(policy, 4)
    with torch.no_grad():
        for value in reference.average.state.values():
            value.zero_()
    reference.load_state_dict({f"reference.{k}": v for k, v in reference.average.state.items()})
    assert reference.distance(policy) == 1.0


def test_reference_waits_while_the_bonus_selects(recipe, ranks, tmp_path):
    recipe.algorithm.reference.ema_max_selection_rate = 0.25
    trainer = small_trainer(recipe, ranks, tmp_path)
    # None: no group gave the bonus a choice.
    assert moved_in(trainer, [0.3, 0.25, None, 1.0]) == [False, True, True, False]


def test_selection_rate_of_a_step_is_recorded_and_decides_whether_the_reference_moves(
    recipe, ranks, tmp_path
):
    trainer = small_trainer(recipe, ranks, tmp_path)
    asked = []
    trainer.reference.track = lambda model, step, rate: asked.append(rate)
    step = one_step(trainer)
    chosen = choices = 0
    for group in step.groups:
        accurate = (group.accuracy > 0) & ~group.answer_likelihood.isnan()
        if accurate.sum() > 1:
            choices += 1
            chosen += len(set(group.consistency_bonus[accurate].tolist())) > 1
    assert chosen > 0
    assert step.metrics["care/selection_rate"] == chosen / choices
    assert asked == [step.metrics["care/selection_rate"]]


def test_a_bonus_that_no_longer_selects_is_reported_now_and_then(recipe, ranks, tmp_path, capsys):
    trainer = small_trainer(recipe, ranks, tmp_path)
    rates = [0.8] * 10 + [0.0] * (step_watch._IDLE_STEPS + step_watch._REPEAT_AFTER)
    for step, rate in enumerate(rates, start=1):
        trainer.watch.check_selection(step, rate)
        trainer.watch.check_selection(step, None)
    warnings = [
        line for line in capsys.readouterr().out.splitlines() if "care/selection_rate" in line
    ]
    # The first time the mean over the last 20 steps, one of them at 0.8, is at most 5%.
    assert [line.split(":")[0] for line in warnings] == ["step 29", "step 79"]
    assert "in the last 20 steps the bonus distinguished accurate completions in 4%" in warnings[0]


def test_a_bonus_for_all_of_the_accurate_is_not_said_to_be_idle(recipe, ranks, tmp_path, capsys):
    recipe.algorithm.consistency.kind = "accurate"
    trainer = small_trainer(recipe, ranks, tmp_path)
    for step in range(1, step_watch._IDLE_STEPS + 2):
        trainer.watch.check_selection(step, 0.0)
    assert "care/selection_rate" not in capsys.readouterr().out


def test_the_counterfactual_bonus_needs_shared_prompts(recipe):
    recipe.algorithm.consistency.kind = "counterfactual"
    check_recipe(recipe)
    recipe.algorithm.shared_prompt = False
    with pytest.raises(InputError, match=r"needs algorithm\.shared_prompt=true"):
        check_recipe(recipe)


@pytest.mark.parametrize("offload", [False, True])
def test_reference_starts_with_the_policy_s_weights_and_the_checkpoint_is_read_once(
    recipe, ranks, tmp_path, monkeypatch, offload
):
    opened = []

    def noted(file):
        opened.append(file.name)
        return open_shard(file)

    open_shard = hf_tensors._opened
    monkeypatch.setattr(hf_tensors, "_opened", noted)
    recipe.algorithm.reference.offload = offload
    trainer = small_trainer(recipe, ranks, tmp_path)
    assert opened == ["model.safetensors"]
    policy, average = dict(trainer.policy.model.named_parameters()), trainer.reference.average
    with average.in_place():
        for name, parameter in average.model.named_parameters():
            assert torch.equal(parameter, policy[name])
            assert torch.equal(average.state[name].to(parameter.device), policy[name].float())
            assert parameter.data_ptr() != policy[name].data_ptr()
