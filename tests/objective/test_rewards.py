import math
import random
import re
import subprocess
import sys
import time

import jiwer
import pytest
from rouge_score import rouge_scorer

from nemo_care.errors import InputError
from nemo_care.objective.rewards import (
    PROBLEM_TYPES,
    accuracy_reward,
    evaluation_accuracy,
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


def random_texts(seed: int, characters: str, count: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(characters, k=draw.randrange(60))) for _ in range(count)]


def test_free_form_equals_the_library_with_its_own_tokenizer_on_ascii():
    library = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    # Few letters, so that words recur and are stemmed; every ASCII character, too.
    texts = random_texts(1, "abdeginrsy XY12,.'_-\n\t  ", 1000)
    texts += random_texts(2, "".join(map(chr, range(128))) + " " * 30, 400)
    texts += ["running dogs' relational happiness", "The dogs ran; relate happily!", "", "a"]
    some = 0
    for answer, solution in zip(texts, texts[1:] + texts[:1], strict=True):
        if not extract_answer(complete(answer)) or not solution.strip():
            continue
        scores = library.score(solution, answer.strip())
        expected = sum(score.fmeasure for score in scores.values()) / 3
        assert accuracy_reward("free-form", complete(answer), solution) == min(1.0, expected)
        some += 0 < expected < 1
    assert some > 300


@pytest.mark.parametrize(
    ("answer", "solution", "expected"),
    [
        # 4 and 4 characters, 3 in common: 3/4. Pairs: 3 and 3, 2 in common: 2/3.
        ("猫在树上", "猫在树下", (3 / 4 + 2 / 3 + 3 / 4) / 3),
        ("猫在树上。", "猫在树上", 1),
        ("犬", "猫在树上", 0),
        ("Кошка спит", "кошка спит!", 1),
        ("हिन्दी भाषा", "हिन्दी भाषा", 1),
        # Written otherwise, and the same.
        ("cafe\u0301 noir", "café noir", 1),
        ("ＡＢＣ １２", "abc 12", 1),
        # The library's own tokenizer makes "caf" of both: 1.
        ("cafè au", "café au", (1 / 2 + 0 + 1 / 2) / 3),
    ],
)
def test_free_form_compares_words_of_every_script(answer, solution, expected):
    score = accuracy_reward("free-form", complete(answer), solution)
    assert score == pytest.approx(expected)


def test_ocr_equals_jiwer():
    texts = [text for text in random_texts(3, "ab 中 \n", 600) if text.strip()]
    for answer, solution in zip(texts, texts[1:] + texts[:1], strict=True):
        reference, hypothesis = (" ".join(text.split()) for text in (solution, answer))
        expected = max(0.0, 1 - jiwer.wer(reference, hypothesis))
        assert accuracy_reward("OCR", complete(answer), solution) == pytest.approx(expected)


LONG_ANSWERS = {
    "sentence": "the quick brown fox jumps " * 4_000,
    "numbers": " ".join(map(str, range(17_000))),
    "one word": "y" * 100_000,
    "Chinese": "猫在树上" * 5_000,
    "blanks": "a" + " " * 100_000 + "b",
    "digits": "9" * 100_000,
    "powers": "9^" * 50_000 + "9",
    "braces": "{" * 100_000,
    "marks": "a" + "\u0301" * 100_000,
}


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("answer", LONG_ANSWERS.values(), ids=LONG_ANSWERS)
def test_no_long_answer_makes_a_reward_slow(problem_type, answer):
    for solution in ("12", answer):
        start = time.process_time()
        score = accuracy_reward(problem_type, complete(answer), solution)
        assert time.process_time() - start < 5
        assert 0 <= score <= 1
        if solution == answer and problem_type in ("OCR", "multiple choice"):
            assert score == 1


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
    solution = "B" if problem_type in ("multiple choice", "OCR", "free-form") else "12"
    right = f"<answer>77</answer> wait <answer>{solution}</answer>"
    wrong = f"<answer>{solution}</answer> wait <answer>77</answer>"
    if problem_type == "free-form":
        # One word has no pairs of words, so ROUGE-2 stays 0.
        assert accuracy_reward(problem_type, right, solution) == pytest.approx(2 / 3)
    else:
        assert accuracy_reward(problem_type, right, solution) == pytest.approx(1)
    assert accuracy_reward(problem_type, wrong, solution) == 0
    assert isinstance(accuracy_reward(problem_type, right, solution), float)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("solution", ["", " ", "<answer></answer>", "B", "0", "nan", "!"])
@pytest.mark.parametrize("answer", ["", " \n"])
def test_an_empty_answer_scores_zero_whatever_the_solution(problem_type, solution, answer):
    assert accuracy_reward(problem_type, complete(answer), solution) == 0
    assert evaluation_accuracy(problem_type, complete(answer), solution) == 0
    # Nor does any answer to an empty solution, not even the same nothing.
    assert accuracy_reward(problem_type, complete("B"), "") == 0


@pytest.mark.parametrize(
    ("completion", "counted"),
    [("B", 1), (" B\n", 1), ("The answer is B", 0), ("<answer>A</answer> B", 0), ("", 0)],
)
def test_an_evaluation_may_take_an_untagged_text_as_the_answer(completion, counted):
    assert evaluation_accuracy("multiple choice", completion, "B", untagged_counts=True) == counted
    assert evaluation_accuracy("multiple choice", completion, "B") == 0


def test_untagged_numbers_count_and_empty_tags_do_not():
    assert evaluation_accuracy("regression", "9.6", "10", untagged_counts=True) == 1
    assert evaluation_accuracy("numerical", "42", "42", untagged_counts=True) == 1
    # The authors' evaluation takes the whole text, tags and all, which no solution equals.
    assert evaluation_accuracy("OCR", complete(""), "B", untagged_counts=True) == 0
    assert evaluation_accuracy("multiple choice", "", "", untagged_counts=True) == 0


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
        # Not in the paper.
        "quantity",
        "math",
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


# What the authors' code and the paper say; in quadratic time.
FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


def test_format_equals_the_regular_expression():
    draw = random.Random(1)
    parts = ["<think>", "</think>", "<answer>", "</answer>", " ", "\n", "\u2003", "x", "<", ">"]
    right = 0
    for number in range(10_000):
        text = "".join(draw.choices(parts, k=draw.randrange(9)))
        if number % 2:
            text = f"<think>{text}</answer>"
        expected = float(FORMAT.fullmatch(text) is not None)
        assert format_reward(text) == expected, text
        right += expected
    assert right > 100
    # With pieces of tags at every place where two parts could overlap.
    for cut in range(len("<think></think><answer></answer>")):
        text = "<think></think><answer></answer>"
        assert format_reward(text[:cut] + text[cut + 1 :]) == 0


@pytest.mark.parametrize(
    "text",
    [
        "<think>" + "</think>" * 40_000 + "</answer>",
        "<think>" + "</think><answer" * 40_000 + "</answer>",
        "<think>" + "</think> " * 40_000 + "</answer>",
        "<think></think>" + " " * 400_000 + "</answer>",
        "<think>" * 40_000,
        "<think>" + "</think><answer>" * 40_000,
    ],
)
def test_format_takes_linear_time(text):
    start = time.process_time()
    assert format_reward(text) == 0
    assert time.process_time() - start < 0.5


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
        "heavy = {'rapidfuzz', 'rouge_score', 'regex', 'pint', 'math_verify', 'sympy', 'torch'};"
        "sys.exit(int(bool(heavy & set(sys.modules))))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
