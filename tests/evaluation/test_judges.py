"""The rule judge goes by the option named last in the reasoning, never by a letter."""

import pytest

from nemo_care.data.samples import Sample
from nemo_care.evaluation.judges import rule_verdict

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
