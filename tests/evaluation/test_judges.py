"""The rule judge goes by the option named last in the reasoning, never by a letter."""

import pytest

from nemo_care.data.samples import Sample
from nemo_care.evaluation.judges import rule_judge, rule_verdict

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
    assert rule_judge(completion, OPTIONS) is consistent


def test_completion_without_an_answer_is_inconsistent():
    assert not rule_judge("<think> it moves right </think>", OPTIONS)


def test_rule_says_nothing_of_open_questions():
    completion = "<think> it moves right </think> <answer> B </answer>"
    assert rule_verdict(completion, Sample("1", "?", "B")).consistent is None
    assert rule_verdict(completion, Sample("1", "?", "B", options=OPTIONS)).consistent is True
