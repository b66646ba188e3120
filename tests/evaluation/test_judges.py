"""The rule judge goes by the option named last in the reasoning, never by a letter."""

from pathlib import Path

import pytest
from made_verdicts import verdicts_of
from small_runs import small_recipe

from nemo_care.data.samples import Sample
from nemo_care.errors import InputError
from nemo_care.evaluation.judges import (
    Evaluation,
    Judge,
    Verdict,
    judge_class,
    known,
    rule_verdict,
)
from nemo_care.evaluation.settings import evaluation_settings
from nemo_care.recipe.evaluation import JUDGES
from nemo_care.recipe.schema import check_recipe

OPTIONS = {"A": "left", "B": "right", "C": "up", "D": "down"}


@pytest.mark.parametrize(
    ("reasoning", "answer", "consistent"),
    [
        ("it moves right", "B", True),
        ("it moves right", "A", False),
        ("it starts at the left and ends at the right so it moves right", "B", True),
        ("it moves right so it came from the left", "A", True),
        ("it moves", "B", False),
        ("the answer is B", "B", False),
        ("upright", "C", False),
        ("upright", "B", False),
    ],
)
def test_last_named_option_decides(reasoning, answer, consistent):
    completion = f"<think> {reasoning} </think> <answer> {answer} </answer>"
    assert rule_verdict(completion, Sample("1", "?", "B", options=OPTIONS)).consistent is consistent
    # The rule can't decide on open questions.
    assert rule_verdict(completion, Sample("1", "?", "B")).consistent is None


def test_completion_without_an_answer_is_inconsistent():
    sample = Sample("1", "?", "B", options=OPTIONS)
    assert rule_verdict("<think> it moves right </think>", sample).consistent is False


class Seeded(Judge):
    """Finds every completion consistent if the seed is even."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @classmethod
    def build(cls, evaluation):
        return cls(evaluation.recipe.trainer.seed)

    @classmethod
    def settings(cls, recipe):
        return {"parity": recipe.trainer.seed % 2}

    def judge(self, groups):
        return [known(Verdict(self.seed % 2 == 0)) for _ in groups]


def test_a_new_judge_is_a_class_and_an_entry(checkpoint, world, ranks, monkeypatch):
    recipe = small_recipe(checkpoint, world)
    recipe.evaluation.judge, recipe.trainer.seed = "seeded", 7
    with pytest.raises(InputError, match=r"evaluation.judge=seeded: choose .*rule"):
        check_recipe(recipe)
    monkeypatch.setitem(JUDGES, "seeded", f"{__name__}:Seeded")
    check_recipe(recipe)
    assert evaluation_settings(recipe, {})["parity"] == 1
    judge = judge_class("seeded").build(Evaluation(recipe, ranks, None, None, Path()))
    assert [verdict.consistent for verdict in verdicts_of(judge, [None, None])] == [False, False]
