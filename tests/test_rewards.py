import math
import subprocess
import sys

import pytest

from nemo_care.errors import InputError
from nemo_care.objective.rewards import (
    PROBLEM_TYPES,
    accuracy_reward,
    format_reward,
    mean_relative_accuracy,
    parse_number,
)
from nemo_care.objective.text import extract_answer, parse_completion


def complete(answer: str) -> str:
    return f"<think>Let me see.</think>\n<answer>{answer}</answer>"


def edit_distance(reference: list[str], hypothesis: list[str]) -> int:
    row = list(range(len(hypothesis) + 1))
    for i, expected in enumerate(reference, 1):
        above, row[0] = row[0], i
        for j, word in enumerate(hypothesis, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (word != expected))
    return row[-1]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>A</answer>", "A"),
        ("<answer> A\n</answer>", " A\n"),
        ("<answer>A</answer> no, <answer>B</answer>", "B"),
        ("<answer>A <answer>B</answer>", "B"),
        ("<answer>A</answer></answer>", "A"),
        ("<answer>A<answer>B</answer>C</answer>", "B"),
        ("<answer>A</answer> then <answer>B", "A"),
        ("</answer><answer>A</answer>", "A"),
        ("<answer></answer>", ""),
        ("<answer>A", None),
        ("A</answer>", None),
        ("</answer>A<answer>", None),
        ("<answer</answer>", None),
        ("<Answer>A</Answer>", None),
        ("", None),
    ],
)
def test_the_last_innermost_pair_of_tags_holds_the_answer(text, answer):
    parsed = parse_completion(text)
    assert parsed.answer == answer
    assert extract_answer(text) == (None if answer is None else answer.strip())
    if answer is None:
        assert parsed.answer_span is None
    else:
        start, end = parsed.answer_span
        assert text[start:end] == answer
        assert text[:start].endswith("<answer>")
        assert text[end:].startswith("</answer>")


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        ("<think>why\nnot</think><answer>A</answer>", "why\nnot"),
        ("so <think>why</think> or <think>not</think>", "why"),
        ("<think></think>", ""),
        ("<think>why", None),
        ("why</think>", None),
        ("</think>why<think>", None),
    ],
)
def test_the_reasoning_stands_between_the_first_think_tags(text, reasoning):
    assert parse_completion(text).reasoning == reasoning


@pytest.mark.parametrize(
    ("answer", "solution", "expected"),
    [
        ("B", "B", 1),
        (" B\n", "B", 1),
        ("B", "<answer>B</answer>", 1),
        ("B", " <answer> B </answer>\n", 1),
        ("b", "B", 0),
        ("B.", "B", 0),
        ("A", "B", 0),
        ("", "B", 0),
    ],
)
def test_multiple_choice_asks_for_the_same_stripped_text(answer, solution, expected):
    assert accuracy_reward("multiple choice", complete(answer), solution) == expected


@pytest.mark.parametrize(
    ("answer", "solution", "expected"),
    [
        ("42", "42", 1),
        ("042", "42", 1),
        ("-3", "-3", 1),
        ("3.14159", "3.14", 1),
        ("3.146", "3.14", 0),
        ("1,234.5", "1234.50", 1),
        ("1,234", "1,234", 1),
        # Exactly one of the two has a decimal point or a comma.
        ("42.0", "42", 0),
        ("1,234", "1234", 0),
        ("1234", "1,234", 0),
        ("forty-two", "42", 0),
        ("42", "forty-two", 0),
        ("42 apples", "42", 0),
        ("", "42", 0),
        ("nan", "nan", 0),
        ("inf", "inf", 0),
        ("1e999", "1e999", 0),
    ],
)
def test_numerical_compares_two_decimals_of_numbers_written_alike(answer, solution, expected):
    assert accuracy_reward("numerical", complete(answer), solution) == expected
    wrapped = f"<answer>{solution}</answer>"
    assert accuracy_reward("numerical", complete(answer), wrapped) == expected


@pytest.mark.parametrize(
    ("answer", "solution"),
    [
        ("no entry", "no entry"),
        ("no  entry\t", "no entry"),
        ("no\nentry after 8", "no entry after 9 pm"),
        ("entry", "no entry"),
        ("", "no entry"),
        ("No Entry", "no entry"),
        ("a b c d e f", "x"),
        ("出口 左", "出口 右"),
    ],
)
def test_ocr_is_one_minus_the_word_error_rate(answer, solution):
    errors = edit_distance(solution.split(), answer.split())
    expected = max(0.0, 1 - errors / len(solution.split()))
    assert accuracy_reward("OCR", complete(answer), solution) == pytest.approx(expected)


def test_free_form_is_the_mean_f1_of_three_rouges():
    # Words: 3 and 3, 2 in common (stemmed: runs = running). Pairs of words: 2 and 2, 1 in common.
    # Longest common subsequence: 2.
    score = accuracy_reward("free-form", complete("the dog runs"), "The dog sleeps")
    assert score == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)
    assert accuracy_reward("free-form", complete("dogs running"), "dog runs") == pytest.approx(1)
    assert accuracy_reward("free-form", complete("cat"), "dog") == 0
    assert accuracy_reward("free-form", complete(""), "dog") == 0


def test_free_form_takes_precision_and_recall():
    # Precision 1/4 and recall 1, so F1 = 0.4 for single words and for the subsequence, 0 for pairs.
    score = accuracy_reward("free-form", complete("a dog sat there"), "dog")
    assert score == pytest.approx((0.4 + 0 + 0.4) / 3)


@pytest.mark.parametrize(
    ("answer", "solution", "expected"),
    [
        ("10", "10", 1),
        ("9", "10", 0.9),
        ("-10", "10", 0),
        ("1,100", "1000", 0.9),
        ("1000", "10", 0),
        ("5", "0", 0),
        ("ten", "10", 0),
        ("10", "ten", 0),
        ("nan", "10", 0),
        ("inf", "10", 0),
        ("10", "inf", 0),
        ("-1e308", "1e308", 0),
    ],
)
def test_regression_is_one_minus_the_relative_error(answer, solution, expected):
    score = accuracy_reward("regression", complete(answer), solution)
    assert score == pytest.approx(expected, abs=1e-8)
    assert 0 <= score <= 1


def test_regression_follows_the_formula_to_its_epsilons():
    assert accuracy_reward("regression", complete("1e-9"), "3e-9") == pytest.approx(1 / 4)
    # At 0 the formula gives (0 + eps) / (0 + eps) = 1, so not even the right answer scores.
    assert accuracy_reward("regression", complete("0"), "0") == 0


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("completion", ["", "B", "<answer>B", "B</answer>", "<think>B</think>"])
def test_a_completion_without_an_answer_scores_zero(problem_type, completion):
    assert accuracy_reward(problem_type, completion, "B") == 0


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_the_last_answer_counts_and_scores_are_floats(problem_type):
    solution = "12" if problem_type in ("numerical", "regression") else "B"
    right = f"<answer>77</answer> wait <answer>{solution}</answer>"
    wrong = f"<answer>{solution}</answer> wait <answer>77</answer>"
    if problem_type == "free-form":
        # One word has no pairs of words, so ROUGE-2 stays 0.
        assert accuracy_reward(problem_type, right, solution) == pytest.approx(2 / 3)
    else:
        assert accuracy_reward(problem_type, right, solution) == pytest.approx(1)
    assert accuracy_reward(problem_type, wrong, solution) == 0
    assert isinstance(accuracy_reward(problem_type, right, solution), float)


def test_an_unknown_problem_type_names_the_known_ones():
    with pytest.raises(InputError, match="'essay'") as caught:
        accuracy_reward("essay", complete("B"), "B")
    assert all(name in str(caught.value) for name in PROBLEM_TYPES)
    assert "\n" not in str(caught.value)
    assert set(PROBLEM_TYPES) == {
        "multiple choice",
        "numerical",
        "OCR",
        "free-form",
        "regression",
    }


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>why</think><answer>B</answer>", 1),
        ("<think>why</think> \n\t<answer>B</answer>", 1),
        ("<think>a\nb</think>\n<answer>c\nd</answer>", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>why</think> so <answer>B</answer>", 0),
        ("Well. <think>why</think><answer>B</answer>", 0),
        ("<think>why</think><answer>B</answer> Done.", 0),
        ("<think>why</think><answer>B</answer>\n", 0),
        ("\n<think>why</think><answer>B</answer>", 0),
        ("<think>why</think><answer>B", 0),
        ("<think>why<answer>B</answer>", 0),
        ("why</think><answer>B</answer>", 0),
        ("<answer>B</answer><think>why</think>", 0),
        ("<answer>B</answer>", 0),
        ("", 0),
    ],
)
def test_format_asks_for_reasoning_and_answer_and_nothing_else(completion, expected):
    assert format_reward(completion) == expected
    assert isinstance(format_reward(completion), float)


@pytest.mark.parametrize(
    ("reasoning", "words"), [("", 0), (" \n ", 0), ("one", 1), ("one\ntwo  three", 3)]
)
def test_format_counts_the_words_of_the_reasoning_when_asked(reasoning, words):
    completion = f"<think>{reasoning}</think><answer>many words which do not count</answer>"
    for minimum in range(6):
        expected = float(words >= minimum)
        assert format_reward(completion, min_reasoning_words=minimum) == expected


@pytest.mark.parametrize(
    ("out", "gt", "expected"),
    [
        (10, 10, 1.0),
        (9.6, 10, 1.0),
        # On a limit the comparison is strict: 0.05 < 0.05 fails, the nine looser ones pass.
        (9.5, 10, 0.9),
        (10.5, 10, 0.9),
        (0.95, 1, 0.9),
        (0.8, 1, 0.6),
        (1.2, 1, 0.6),
        (0.7, 1, 0.4),
        (7.4, 10, 0.5),
        (0.5, 1, 0.0),
        (5.1, 10, 0.1),
        (-10, 10, 0.0),
        (-9.6, -10, 1.0),
        (0, 0, 1.0),
        (1e-12, 0, 0.0),
        (math.nan, 1, 0.0),
        (math.inf, math.inf, 0.0),
    ],
)
def test_mean_relative_accuracy_counts_the_thresholds_passed(out, gt, expected):
    assert mean_relative_accuracy(out, gt) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,234.5", 1234.5), (" 7 ", 7), ("-2e3", -2000), ("", None), ("NaN", None), ("x", None)],
)
def test_numbers_are_finite_or_none(text, number):
    assert parse_number(text) == number


def test_scoring_libraries_load_only_when_a_score_needs_them():
    code = (
        "import sys, nemo_care.objective.rewards as rewards;"
        "rewards.accuracy_reward('multiple choice', '<answer>B</answer>', 'B');"
        "sys.exit(int(bool({'jiwer', 'rouge_score', 'torch'} & set(sys.modules))))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
