"""Base reward of one completion: accuracy by answer kind, and format (arXiv 2506.16141, step 2).

No completion makes a reward slow: the time of each is bounded as its function describes, and scores
are exact, never those of a shortened text. `docs/rewards.md` compares them with the authors' code.
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nemo_care.errors import InputError
from nemo_care.objective.expressions import same_expression
from nemo_care.objective.quantities import same_quantity
from nemo_care.objective.text import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    THINK_CLOSE,
    THINK_OPEN,
    extract_answer,
    parse_completion,
)
from nemo_care.objective.words import rouge_f1, word_accuracy

if TYPE_CHECKING:
    from torch import Tensor

_BETWEEN = re.compile(rf"{THINK_CLOSE}\s*{ANSWER_OPEN}")
EPSILON = 1e-9
"""Keeps the relative error of a regression answer finite where the solution is 0."""

# 1 - t for the thresholds t = 0.50, 0.55, ..., 0.95 of the mean relative accuracy.
_LIMITS = tuple((50 - 5 * k) / 100 for k in range(10))


def accuracy_reward(problem_type: str, completion: str, solution: str) -> float:
    """Accuracy in [0, 1] of a completion's answer (arXiv 2506.16141, step 2; five answer kinds).

    `completion` is the whole text, of which the last well-formed `<answer>...</answer>` counts; a
    completion without one, or with an empty one, scores 0. `solution` can be wrapped in `<answer>`
    tags. The kinds `quantity` and `math` are not in the paper.
    Raises InputError for a problem_type that is not in `PROBLEM_TYPES`.
    """
    return _scored(_SCORES, problem_type, extract_answer(completion), solution)


def evaluation_accuracy(
    problem_type: str, completion: str, solution: str, *, untagged_counts: bool = False
) -> float:
    """Accuracy as reported by evaluations: the reward or, for regression, mean relative accuracy.

    Arguments and errors as in `accuracy_reward`. With `untagged_counts`, the whole text of a
    completion without an answer is its answer, as in the authors' evaluation.
    """
    answer = extract_answer(completion)
    if untagged_counts and not answer:
        answer = completion.strip()
    return _scored(_EVALUATION_SCORES, problem_type, answer, solution)


def _scored(
    scores: dict[str, Callable[[str, str], float]],
    problem_type: str,
    answer: str | None,
    solution: str,
) -> float:
    score = scores.get(problem_type)
    if score is None:
        known = ", ".join(repr(name) for name in PROBLEM_TYPES)
        raise InputError(f"problem_type {problem_type!r} is unknown: use one of {known}")
    wrapped = extract_answer(solution)
    truth = solution.strip() if wrapped is None else wrapped
    # An empty answer is never right, even if a data set has an empty solution.
    return float(score(answer, truth)) if answer and truth else 0.0


def format_reward(completion: str, *, min_reasoning_words: int = 0) -> float:
    r"""1.0 if the whole completion is `<think>...</think> <answer>...</answer>`, else 0.0.

    Only white space is allowed between the two parts, and nothing before or after them (arXiv
    2506.16141, step 2). This has the result of the authors' expression
    `<think>.*?</think>\s*<answer>.*?</answer>`, but in linear instead of quadratic time.
    `min_reasoning_words` > 0 is not in the paper: it also requires that number of words, separated
    by white space, between the think tags, against a collapse to an empty reasoning.
    """
    if not (completion.startswith(THINK_OPEN) and completion.endswith(ANSWER_CLOSE)):
        return 0.0
    # Both parts can contain any text, including tags: one place where they meet is sufficient.
    end = len(completion) - len(ANSWER_CLOSE)
    if _BETWEEN.search(completion, len(THINK_OPEN), end) is None:
        return 0.0
    reasoning = parse_completion(completion).reasoning or ""
    return float(len(reasoning.split()) >= min_reasoning_words)


def base_reward(rewards: "Tensor", weights: Sequence[float]) -> "Tensor":
    """Return r^b of each completion: the weighted sum of its rewards (arXiv 2506.16141, step 2).

    `rewards` float [K, G], a row per reward; `weights` K numbers, all 1 in the paper, whose
    rewards are accuracy and format. Returns [G].
    """
    return (rewards * rewards.new_tensor(weights)[:, None]).sum(dim=0)


def length_penalty(tokens: int, *, longest: int, buffer: float) -> float:
    """Soft penalty of a completion whose length approaches the token limit, in [-1, 0].

    0 up to longest - buffer tokens, then decreasing linearly to -1 at `longest` (DAPO, arXiv
    2503.14476, section 3.4, equation 13, whose L_max and L_cache these are). `buffer` is above 0. A
    completion that was cut off has `longest` tokens.
    """
    return -min(1.0, max(0.0, (tokens - (longest - buffer)) / buffer))


def parse_number(text: str) -> float | None:
    """Parse a finite number, ignoring commas; None for anything else."""
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
    # The comparison is strict: EPSILON prevents an error exactly at a limit from passing because
    # its quotient was rounded down.
    relative_error = abs(out - gt) / abs(gt) + EPSILON
    return sum(relative_error < limit for limit in _LIMITS) / len(_LIMITS)


def _same_number(answer: str, solution: str) -> bool:
    if _has_decimal_mark(answer) != _has_decimal_mark(solution):
        return False
    out, gt = parse_number(answer), parse_number(solution)
    return out is not None and gt is not None and round(out, 2) == round(gt, 2)


def _has_decimal_mark(text: str) -> bool:
    return "." in text or "," in text


def _relative_accuracy(answer: str, solution: str) -> float:
    out, gt = parse_number(answer), parse_number(solution)
    if out is None or gt is None:
        return 0.0
    return 1.0 - min(1.0, (abs(out - gt) + EPSILON) / (abs(gt) + EPSILON))


def _mean_relative_accuracy(answer: str, solution: str) -> float:
    out, gt = parse_number(answer), parse_number(solution)
    return 0.0 if out is None or gt is None else mean_relative_accuracy(out, gt)


_SCORES: dict[str, Callable[[str, str], float]] = {
    "multiple choice": operator.eq,
    "numerical": _same_number,
    "OCR": word_accuracy,
    "free-form": rouge_f1,
    "regression": _relative_accuracy,
    "quantity": same_quantity,
    "math": same_expression,
}
_EVALUATION_SCORES = {**_SCORES, "regression": _mean_relative_accuracy}

PROBLEM_TYPES = tuple(_SCORES)
"""The answer kinds that `accuracy_reward` supports."""
