"""What a run says, or ends with, when its answers get no likelihood or its groups no signal."""

import dataclasses

import pytest
from records import lines
from small_runs import small_recipe, small_trainer

from nemo_care.errors import RunFailed
from nemo_care.ranks.process_groups import Layout
from nemo_care.training import step_watch


def lose_answers(trainer, keep: float = 0.0) -> None:
    """Let no answer have tokens, but for the first ones: the share `keep` of the completions."""
    generate = trainer.rollouts.generate

    def losing(prompts):
        groups = generate(prompts)
        completions = [c for group in groups for c in group.completions]
        lost = iter(number >= keep * len(completions) for number in range(len(completions)))
        for group in groups:
            group.completions = [
                dataclasses.replace(c, answer_span=None, answer_cuts=None) if next(lost) else c
                for c in group.completions
            ]
        return groups

    trainer.rollouts.generate = losing


@pytest.fixture
def recipe(checkpoint, world):
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 2
    return recipe


def test_answers_without_tokens_end_the_first_step_with_one_of_them(recipe, ranks, tmp_path):
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    lose_answers(trainer)
    with pytest.raises(
        RunFailed, match="well-formed answers of the first step that has any"
    ) as error:
        trainer.fit()
    message = str(error.value)
    assert "</answer>" in message
    assert "'<answer>', " in message
    assert not (tmp_path / "metrics.jsonl").exists() or not lines(tmp_path / "metrics.jsonl")


def test_a_few_answers_without_tokens_are_counted_apart(recipe, ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(step_watch, "_MAX_UNSCORED", 0.5)
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    lose_answers(trainer, keep=0.75)
    trainer.fit()
    for metrics in lines(tmp_path / "metrics.jsonl"):
        rows = lines(tmp_path / "rollouts" / f"step_{metrics['step']:06d}.jsonl")
        unscored = sum(row["unscored"] for row in rows)
        assert 0 < unscored <= 4
        assert metrics["care/unscored_answer_rate"] == unscored / len(rows)
        missing = sum("</answer>" not in row["completion"] for row in rows)
        assert metrics["care/missing_answer_rate"] == missing / len(rows)
        assert all(row["answer_likelihood"] is None for row in rows if row["unscored"])
        assert all(row["bonus"] == 0 for row in rows if row["unscored"])


def test_without_a_bonus_no_answer_needs_tokens(recipe, ranks, tmp_path):
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    lose_answers(trainer)
    trainer.fit()
    assert lines(tmp_path / "metrics.jsonl")[0]["care/unscored_answer_rate"] > 0.5


def first_step(ranks, job) -> str:
    """How a run ends of which the second rank finds no tokens of its answers."""
    folder, recipe = job
    trainer = small_trainer(recipe, ranks, folder)
    if ranks.rank == 1:
        lose_answers(trainer)
    with pytest.raises(RunFailed) as error:
        trainer.fit()
    return str(error.value)


def test_all_ranks_end_when_the_answers_of_one_replica_have_no_tokens(on_ranks, recipe, tmp_path):
    first, second = on_ranks(Layout(), first_step, (tmp_path, recipe), replicas=2)
    assert first == second
    assert "'<answer>', " in first


def test_steps_in_which_no_group_has_a_signal_are_told_now_and_then(
    recipe, ranks, tmp_path, capsys
):
    watch = small_trainer(recipe, ranks, tmp_path).watch
    silent = [{"advantage": 0.0, "reward": 1.0}] * 3 + [{"advantage": 0.0, "reward": 2.0}]
    heard = [{"advantage": 0.0, "reward": 1.0}, {"advantage": 0.1, "reward": 1.5}]
    steps = [silent] * 5 + [heard] + [silent] * 60 + [heard] + [silent] * 9
    for step, rows in enumerate(steps, start=1):
        watch.check_signal(step, rows)
    told = [
        line for line in capsys.readouterr().out.splitlines() if "no group had a signal" in line
    ]
    assert [line.split(":")[0] for line in told] == ["step 16", "step 66"]
    assert "in the last 10 steps" in told[0]
    assert "1.250 on average" in told[0]


def test_a_run_whose_rewards_are_all_equal_says_so(recipe, ranks, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(step_watch, "_SILENT_STEPS", 2)
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    recipe.rollout.temperature = 0.0
    small_trainer(recipe, ranks, tmp_path, saves=False).fit()
    groups = [line["rollout/groups_without_signal"] for line in lines(tmp_path / "metrics.jsonl")]
    assert groups == [4, 4]
    assert capsys.readouterr().out.count("no group had a signal") == 1
