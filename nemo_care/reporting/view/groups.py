"""Turn the rows of a step into groups for the page: text is harmless, and numbers are finite."""

import math
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from nemo_care.files.json_lines import Kinds, Record, complete_lines
from nemo_care.objective.text import CharacterSpan, extract_answer, find_answer, find_reasoning
from nemo_care.process.screen import one_line, printable
from nemo_care.reporting.view.media import Sheet
from nemo_care.runs.metrics import OWN_REWARD
from nemo_care.runs.reader import number
from nemo_care.scoring.reward_functions import OURS

_TAGS = re.compile(r"(</?(think|answer)>|<\|\w+\|>|\s)*")
# Every key is optional: older versions wrote fewer.
_ROW: Kinds = {
    "prompt_id": str,
    "prompt_index": int,
    "completion_index": int,
    "completion": str,
    "prompt_tokens": int,
    "tokens": int,
    "ended": bool,
    "has_answer": bool,
    "unscored": bool,
    "consistent": bool | None,
    "used": bool,
    "question": str,
    "options": dict[str, str],
    "solution": str,
    "problem_type": str,
    "videos": list[str],
    "images": list[str],
    "frame_times": list[list],
    "pair_likelihood": list[float | None],
    "token_texts": list[str],
    "log_probs": list[float | None],
}


def step_groups(file: Path, accuracy_threshold: float) -> list[Record]:
    """Return the groups in a file of `rollouts/`, in the order of the data.

    Completions are sorted by reward, the best first. An answer with an accuracy above
    `accuracy_threshold`, the recipe's, counts as right.

    Raises:
        InputError: a line is damaged.
    """
    by_prompt: dict[Any, list[Record]] = {}
    for place, row in enumerate(complete_lines(file, optional=_ROW)):
        by_prompt.setdefault(row.get("prompt_index", place), []).append(row)
    return [_group(rows, accuracy_threshold) for rows in by_prompt.values()]


def sheets_of(group: Record) -> list[Sheet]:
    """Return the sheets of the videos and images that the model saw."""
    row = group["first_row"]
    times = row.get("frame_times", [])
    videos = row.get("videos", [])
    return [
        *(
            Sheet("video", path, tuple(number(time) for time in seconds))
            # Without times, the frames are unknown.
            for path, seconds in zip(videos, [*times, *[[]] * len(videos)], strict=False)
        ),
        *(Sheet("image", path) for path in row.get("images", [])),
    ]


def _group(rows: Sequence[Record], threshold: float) -> Record:
    first = rows[0]
    ordered = sorted(rows, key=lambda row: row.get("completion_index", 0))
    completions = [_completion(row, place, threshold) for place, row in enumerate(ordered)]
    mean, of_right = _mean_likelihood(completions)
    pairs = [
        [_finite(value) for value in row["pair_likelihood"]]
        for row in ordered
        if len(row.get("pair_likelihood", [])) == len(ordered)
    ]
    rewards = [c["reward"] for c in completions if c["reward"] is not None]
    advantages = [c["advantage"] for c in completions]
    return {
        "first_row": first,
        "id": one_line(first.get("prompt_id", "?")),
        "question": printable(first["question"]) if "question" in first else None,
        "type": one_line(first.get("problem_type", "")),
        "options": [
            [one_line(letter), printable(text), letter == first.get("solution")]
            for letter, text in first.get("options", {}).items()
        ],
        "solution": printable(first["solution"]) if "solution" in first else None,
        "promptTokens": first.get("prompt_tokens"),
        "used": first.get("used"),
        "noSignal": all(value == 0 for value in advantages),
        "meanReward": sum(rewards) / len(rewards) if rewards else None,
        "meanLikelihood": mean,
        "meanOfRight": of_right,
        "pairs": pairs if len(pairs) == len(ordered) else None,
        "completions": sorted(
            completions, key=lambda one: math.inf if one["reward"] is None else -one["reward"]
        ),
    }


def _completion(row: Record, place: int, threshold: float) -> Record:
    text = row.get("completion", "")
    own = {key: OWN_REWARD.match(key) for key in row}
    rewards = {name: row.get(name) for name in OURS if name in row}
    rewards |= {metric.label: row[key] for key, metric in own.items() if metric}
    accuracy, answer = _finite(row.get("accuracy")), extract_answer(text)
    right = None if accuracy is None else accuracy > threshold
    flags = {
        "inconsistent": right is True and row.get("consistent") is False,
        "wrong": right is False,
        "truncated": row.get("ended") is False,
        "unanswered": row.get("has_answer") is False,
    }
    return {
        "place": row.get("completion_index", place),
        "parts": _parts(text, row.get("token_texts", []), row.get("log_probs", [])),
        "answer": None if answer is None else one_line(answer),
        "rewards": [[one_line(name), _finite(value)] for name, value in rewards.items()],
        "reward": _finite(row.get("reward")),
        "likelihood": _finite(row.get("answer_likelihood")),
        "bonus": _finite(row.get("bonus")),
        "advantage": _finite(row.get("advantage")),
        "tokens": row.get("tokens"),
        "right": right,
        "consistent": row.get("consistent"),
        "unscored": row.get("unscored", False),
        "flags": [name for name, raised in flags.items() if raised],
    }


def _finite(value: Any) -> float | None:
    found = number(value)
    return None if math.isnan(found) else found


def _mean_likelihood(completions: Sequence[Record]) -> tuple[float | None, bool]:
    """Return the mean likelihood of the right answers, with which the bonus compares, and True.

    If no right one has a likelihood: that of all answers, and False.
    """
    known = [one for one in completions if one["likelihood"] is not None]
    right = [one["likelihood"] for one in known if one["right"]]
    values = right or [one["likelihood"] for one in known]
    return (sum(values) / len(values) if values else None), bool(right)


def _parts(
    text: str, token_texts: Sequence[str], log_probs: Sequence[float | None]
) -> list[list[Any]]:
    """Cut a completion into [kind, text], or [kind, [[text, log-probability], ...]] with tokens.

    Kinds are reasoning, answer, tags (with white space between them) and other.
    """
    whole = "".join(token_texts)
    # The end of a completion has a token, but no text.
    has_tokens = bool(token_texts) and len(token_texts) == len(log_probs)
    is_tokenised = has_tokens and whole.startswith(text)
    written = whole if is_tokenised else text
    parts: list[list[Any]] = []
    for kind, start, end in _sections(text, len(written)):
        if not kind:
            kind = "tags" if _TAGS.fullmatch(written, start, end) else "other"
        if is_tokenised:
            parts.append([kind, list(_within(token_texts, log_probs, start, end))])
        else:
            parts.append([kind, printable(written[start:end])])
    return parts


def _sections(text: str, end: int) -> list[tuple[str, int, int]]:
    """Return kind, start and end of each non-empty section; the last one reaches to `end`."""
    named: list[tuple[CharacterSpan, str]] = []
    reasoning, answer = find_reasoning(text), find_answer(text)
    if answer is not None:
        named.append((answer, "answer"))
    if reasoning is not None and (answer is None or reasoning[1] <= answer[0]):
        named.append((reasoning, "reasoning"))
    cuts = sorted({0, end, *(place for span, _ in named for place in span)})
    kinds = dict(named)
    return [(kinds.get(span, ""), *span) for span in pairwise(cuts)]


def _within(
    texts: Sequence[str], log_probs: Sequence[float | None], start: int, end: int
) -> Iterator[tuple[str, float | None]]:
    """Yield the tokens between two places of the text; a token across a place is cut there."""
    place = 0
    for token, log_prob in zip(texts, log_probs, strict=True):
        begin, place = place, place + len(token)
        piece = token[max(0, start - begin) : max(0, end - begin)]
        if piece:
            yield printable(piece), _finite(log_prob)
