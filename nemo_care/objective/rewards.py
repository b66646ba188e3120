"""Base reward of one completion: accuracy by answer kind, and format (arXiv 2506.16141, step 2)."""

import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from nemo_care.errors import InputError
from nemo_care.objective.text import extract_answer, parse_completion

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)
"""What a whole completion has to look like."""

EPSILON = 1e-9
"""Keeps the relative error of a regression answer finite where the solution is 0."""

# 1 - t for the thresholds t = 0.50, 0.55, ..., 0.95 of the mean relative accuracy.
_LIMITS = tuple((50 - 5 * k) / 100 for k in range(10))


def accuracy_reward(problem_type: str, completion: str, solution: str) -> float:
    """Accuracy in [0, 1] of a completion's answer (arXiv 2506.16141, step 2; five answer kinds).

    `completion` is the whole text, of which the last well-formed `<answer>...</answer>` counts; a
    completion without one scores 0. `solution` may or may not be wrapped in `<answer>` tags.
    Raises InputError for a problem_type that is none of `PROBLEM_TYPES`.
    """
    score = _SCORES.get(problem_type)
    if score is None:
        known = ", ".join(repr(name) for name in PROBLEM_TYPES)
        raise InputError(f"problem_type {problem_type!r} is not known: use one of {known}")
    answer = extract_answer(completion)
    if answer is None:
        return 0.0
    wrapped = extract_answer(solution)
    return score(answer, solution.strip() if wrapped is None else wrapped)


def evaluation_accuracy(problem_type: str, completion: str, solution: str) -> float:
    """Accuracy as evaluations report it: the reward, but for regression mean relative accuracy.

    Arguments and errors as in `accuracy_reward`.
    """
    if problem_type != "regression":
        return accuracy_reward(problem_type, completion, solution)
    answer, wrapped = extract_answer(completion), extract_answer(solution)
    out = None if answer is None else parse_number(answer)
    truth = parse_number(solution.strip() if wrapped is None else wrapped)
    return 0.0 if out is None or truth is None else mean_relative_accuracy(out, truth)


def format_reward(completion: str, *, min_reasoning_words: int = 0) -> float:
    """1.0 where the whole completion is `<think>...</think> <answer>...</answer>`, else 0.0.

    Only white space may stand between the two parts, nothing before or after them (arXiv
    2506.16141, step 2). `min_reasoning_words` > 0 is not in the paper: it also asks for that many
    words, separated by white space, between the think tags, against a collapse to an empty
    reasoning.
    """
    if FORMAT.fullmatch(completion) is None:
        return 0.0
    reasoning = parse_completion(completion).reasoning or ""
    return float(len(reasoning.split()) >= min_reasoning_words)


def base_reward(rewards: "Tensor", weights: Sequence[float]) -> "Tensor":
    """r^b of each completion: the weighted sum of its rewards (arXiv 2506.16141, step 2).

    `rewards` float [K, G], a row per reward; `weights` K numbers, all 1 in the paper, whose
    rewards are accuracy and format. Returns [G].
    """
    return (rewards * rewards.new_tensor(weights)[:, None]).sum(dim=0)


def parse_number(text: str) -> float | None:
    """The finite number that `text` writes, commas removed; None for anything else."""
    try:
        number = float(text.replace(",", ""))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def mean_relative_accuracy(out: float, gt: float) -> float:
    """Evaluation metric of regression, in [0, 1]: share of thresholds that the answer passes.

    The answer passes t in 0.50, 0.55, ..., 0.95 where abs(out - gt) / abs(gt) < 1 - t. With gt = 0
    only out = 0 passes, and then every threshold. NaN and infinity score 0.
    """
    if not (math.isfinite(out) and math.isfinite(gt)):
        return 0.0
    if gt == 0:
        return float(out == 0)
    # The comparison is strict: EPSILON keeps an error that lies exactly on a limit from passing
    # because its quotient was rounded down.
    relative_error = abs(out - gt) / abs(gt) + EPSILON
    return sum(relative_error < limit for limit in _LIMITS) / len(_LIMITS)


def _same_choice(answer: str, solution: str) -> float:
    return float(answer == solution)


def _same_number(answer: str, solution: str) -> float:
    if _has_decimal_mark(answer) != _has_decimal_mark(solution):
        return 0.0
    out, gt = parse_number(answer), parse_number(solution)
    if out is None or gt is None:
        return 0.0
    return float(round(out, 2) == round(gt, 2))


def _has_decimal_mark(text: str) -> bool:
    return "." in text or "," in text


def _word_accuracy(answer: str, solution: str) -> float:
    import jiwer

    # jiwer splits words at blanks only; a line break or a tab separates words just as well.
    reference, hypothesis = (" ".join(text.split()) for text in (solution, answer))
    return _clip_to_unit(1.0 - jiwer.wer(reference, hypothesis))


def _rouge_f1(answer: str, solution: str) -> float:
    scores = _rouge_scorer().score(solution, answer)
    return _clip_to_unit(sum(score.fmeasure for score in scores.values()) / len(scores))


@cache
def _rouge_scorer() -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def _relative_accuracy(answer: str, solution: str) -> float:
    out, gt = parse_number(answer), parse_number(solution)
    if out is None or gt is None:
        return 0.0
    return 1.0 - min(1.0, (abs(out - gt) + EPSILON) / (abs(gt) + EPSILON))


def _clip_to_unit(value: float) -> float:
    return max(0.0, min(1.0, float(value)))


_SCORES: dict[str, Callable[[str, str], float]] = {
    "multiple choice": _same_choice,
    "numerical": _same_number,
    "OCR": _word_accuracy,
    "free-form": _rouge_f1,
    "regression": _relative_accuracy,
}

PROBLEM_TYPES = tuple(_SCORES)
"""The answer kinds that `accuracy_reward` knows."""
