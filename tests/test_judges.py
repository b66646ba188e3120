"""The rule judge goes by the option named last in the reasoning, never by a letter."""

import pytest

from nemo_care.data.samples import Sample
from nemo_care.evaluation.judges import judged_consistent, rule_judge

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


def test_without_a_judge_or_options_nothing_is_said():
    completion = "<think> it moves right </think> <answer> B </answer>"
    assert judged_consistent("none", completion, Sample("1", "?", "B", options=OPTIONS)) is None
    assert judged_consistent("rule", completion, Sample("1", "?", "B")) is None
    assert judged_consistent("rule", completion, Sample("1", "?", "B", options=OPTIONS)) is True
