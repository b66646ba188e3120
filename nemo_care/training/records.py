"""The records of a step: one row per completion, and metrics computed from the rows."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nemo_care.evaluation.judges import rule_verdict
from nemo_care.groups.group import Group, known
from nemo_care.runs import metrics as m
from nemo_care.runs.metric import Metric
from nemo_care.scoring.reward_functions import OURS

Row = dict[str, Any]


def _number(values: torch.Tensor | None, place: int) -> float | None:
    """Return a JSON number, or None for NaN (no answer) and for a value that is not set."""
    if values is None:
        return None
    value = float(values[place])
    return None if math.isnan(value) else value


def completion_rows(groups: Sequence[Group], judge: str) -> list[Row]:
    """Return one row per completion, as in `rollouts/`; `judge` is the recipe's.

    `accuracy` and `format` are None if they are not among the recipe's rewards. `used` exists only
    with dynamic sampling: whether the step trained on the group.
    """
    return [
        {
            "prompt_id": group.prompt.sample.sample_id,
            "prompt_index": group.prompt.index,
            "completion_index": place,
            "completion": completion.text,
            "prompt_tokens": group.prompt.length,
            "tokens": completion.length,
            "ended": completion.ended,
            "has_answer": completion.has_answer,
            "unscored": completion.is_unscored,
            # Only the rule is free of cost; other judges see only validation's completions.
            "consistent": rule_verdict(completion.text, group.prompt.sample).consistent
            if judge == "rule"
            else None,
            # Built-in rewards have fixed columns, whether the recipe uses them or not.
            **{name: _number(known(group.rewards).get(name), place) for name in OURS},
            **{
                m.OWN_REWARD.of(name): _number(values, place)
                for name, values in known(group.rewards).items()
                if name not in OURS
            },
            "answer_likelihood": _number(group.answer_likelihood, place),
            "bonus": _number(group.consistency_bonus, place),
            "reward": _number(group.reward, place),
            "advantage": _number(group.advantage, place),
            **({} if group.used is None else {"used": group.used}),
        }
        for group in groups
        for place, completion in enumerate(group.completions)
    ]


def rollout_metrics(rows: Sequence[Row], likelihood_clip: float) -> dict[Metric, float | None]:
    """Return metrics of a step's completions, trained on or not (None without any value)."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_index"], []).append(row)
    # Likelihoods are clipped in float32.
    clip = float(torch.tensor(likelihood_clip))
    likelihoods = [row["answer_likelihood"] for row in rows]
    own = filter(None, map(m.OWN_REWARD.match, rows[0] if rows else ()))
    values: dict[Metric, Iterable[float | bool | None]] = {
        m.ACCURACY: (row["accuracy"] for row in rows),
        m.FORMAT: (row["format"] for row in rows),
        m.TOTAL_REWARD: (row["reward"] for row in rows),
        m.ANSWER_LIKELIHOOD: likelihoods,
        m.BONUS_RATE: (row["bonus"] > 0 for row in rows),
        m.CLIPPED_RATE: (p >= clip for p in likelihoods if p is not None),
        m.MISSING_ANSWERS: (not row["has_answer"] for row in rows),
        m.UNSCORED_ANSWERS: (row["unscored"] for row in rows),
        m.CONSISTENCY: (row["consistent"] for row in rows if row["format"] == 1),
        m.PROMPT_TOKENS: (row["prompt_tokens"] for row in rows),
        m.COMPLETION_TOKENS: (row["tokens"] for row in rows),
        m.ENDED: (row["ended"] for row in rows),
        m.ALL_RIGHT: (_all_have_accuracy(group, 1) for group in groups.values()),
        m.ALL_WRONG: (_all_have_accuracy(group, 0) for group in groups.values()),
        m.WITHOUT_SIGNAL: (
            all(row["advantage"] == 0 for row in group) for group in groups.values()
        ),
    }
    values |= {metric: [row[metric] for row in rows] for metric in own}
    return {metric: metric.reduce(of_metric) for metric, of_metric in values.items()}


def _all_have_accuracy(group: Sequence[Row], accuracy: int) -> bool | None:
    """Whether all completions have that accuracy; None if it is not among the rewards."""
    values = {row["accuracy"] for row in group}
    return None if None in values else values == {accuracy}
