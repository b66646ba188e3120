"""A step, as it is handed from phase to phase."""

import pytest
from small_runs import one_step, small_recipe, small_trainer

from nemo_care.runs import metrics as m
from nemo_care.training import step as module
from nemo_care.training.step import Step


def test_a_phase_with_several_parts_is_shown_each_time_and_its_times_add_up(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 7.5])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    shown = []
    step = Step(1, shown=shown.append)
    for _ in range(2):
        with step.timed(m.ROLLOUT_TIME):
            pass
    assert step.timing == {m.ROLLOUT_TIME: 3.5}
    assert shown == ["rollout", "rollout"]


def test_rounds_are_reduced_as_their_metric_says():
    step = Step(1)
    for staleness in (1, 2, 0):
        step.of_round(m.STALENESS, staleness)
    assert step.metrics == {m.STALENESS: 2}
    with pytest.raises(ValueError, match="one value"):
        step.of_round(m.LEARNING_RATE, 0.1)


def test_a_trained_step_holds_all_that_it_did(checkpoint, world, ranks, tmp_path):
    trainer = small_trainer(small_recipe(checkpoint, world), ranks, tmp_path)
    first, second = one_step(trainer, 1), one_step(trainer, 2)
    assert (first.optimizer_steps, second.optimizer_steps) == (0, 1)
    for step in (first, second):
        assert step.groups == step.trained
        assert len(step.groups) == 4
        assert (step.skipped, step.not_finite) == ([], None)
        assert {*m.PHASES, m.DATA_TIME, m.STEP_TIME} == step.timing.keys()
        parts = sum(step.timing[phase] for phase in (*m.PHASES, m.DATA_TIME))
        assert 0.5 * step.timing[m.STEP_TIME] < parts <= step.timing[m.STEP_TIME]
    # No phase keeps anything of a step that is done.
    assert not {*map(id, first.groups)} & {*map(id, second.groups)}


def test_the_last_step_is_known_before_it_begins(checkpoint, world, ranks, tmp_path):
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 3
    trainer = small_trainer(recipe, ranks, tmp_path)
    trainer.step = 1
    assert [(step.number, step.left) for step in trainer.steps()] == [(2, 1), (3, 0)]
    assert list(trainer.steps()) == []
