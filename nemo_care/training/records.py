"""What a step leaves behind: one row per completion, and metrics made from the rows."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nemo_care.evaluation.judges import rule_verdict
from nemo_care.groups.group import Group
from nemo_care.objective.statistics import mean_of_known
from nemo_care.scoring.reward_functions import OURS

Row = dict[str, Any]


_CUSTOM = "reward/"


def _number(values: torch.Tensor | None, place: int) -> float | None:
    """A JSON number; None for NaN (no answer) and where the value was never set."""
    if values is None or not len(values):
        return None
    value = float(values[place])
    return None if math.isnan(value) else value


def completion_rows(groups: Sequence[Group], judge: str) -> list[Row]:
    """One row per completion, as written to `rollouts/`; `judge` is the recipe's.

    `accuracy` and `format` are None where the recipe leaves them out of its rewards. `used` is
    there with dynamic sampling only: whether the step trained on the group.
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
            # Only the rule costs nothing; the other judges see validation's completions.
            "consistent": rule_verdict(completion.text, group.prompt.sample).consistent
            if judge == "rule"
            else None,
            # Ours have columns of their own, whether the recipe uses them or not.
            **{name: _number(group.rewards.get(name), place) for name in OURS},
            **{
                _CUSTOM + name: _number(values, place)
                for name, values in group.rewards.items()
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


def rollout_metrics(rows: Sequence[Row], likelihood_clip: float) -> dict[str, float | None]:
    """Metrics of a step's completions, trained on or not (None where nothing has a value).

    `reward/NAME` is the unweighted mean of a reward, `reward/total` the mean of the weighted sum
    and the bonus. Rates and rewards are means over completions, `groups_*` count groups,
    `prompt_tokens` and `completion_tokens` are mean lengths. A missing answer is none that is
    well-formed, or an empty one; an unscored answer is there, but its tokens were not found.
    """
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prompt_index"], []).append(row)
    # Likelihoods are clipped in float32.
    clip = float(torch.tensor(likelihood_clip))
    likelihoods = [row["answer_likelihood"] for row in rows]
    return {
        "reward/accuracy": mean_of_known([row["accuracy"] for row in rows]),
        "reward/format": mean_of_known([row["format"] for row in rows]),
        **{
            key: mean_of_known([row[key] for row in rows])
            for key in (rows[0] if rows else ())
            if key.startswith(_CUSTOM)
        },
        "reward/total": mean_of_known([row["reward"] for row in rows]),
        "care/answer_likelihood": mean_of_known(likelihoods),
        "care/bonus_rate": mean_of_known([row["bonus"] > 0 for row in rows]),
        "care/clipped_rate": mean_of_known([p >= clip for p in likelihoods if p is not None]),
        "care/missing_answer_rate": mean_of_known([not row["has_answer"] for row in rows]),
        "care/unscored_answer_rate": mean_of_known([row["unscored"] for row in rows]),
        "rollout/consistency_rate": mean_of_known(
            [row["consistent"] for row in rows if row["format"] == 1]
        ),
        "rollout/prompt_tokens": mean_of_known([row["prompt_tokens"] for row in rows]),
        "rollout/completion_tokens": mean_of_known([row["tokens"] for row in rows]),
        "rollout/ended_rate": mean_of_known([row["ended"] for row in rows]),
        "rollout/groups_all_right": _groups_of_accuracy(groups.values(), 1),
        "rollout/groups_all_wrong": _groups_of_accuracy(groups.values(), 0),
        "rollout/groups_without_signal": sum(
            all(row["advantage"] == 0 for row in group) for group in groups.values()
        ),
    }


def _groups_of_accuracy(groups: Iterable[list[Row]], accuracy: int) -> int | None:
    """Groups whose completions all have that accuracy; None where it is not among the rewards."""
    values = [[row["accuracy"] for row in group] for group in groups]
    if any(None in group for group in values):
        return None
    return sum(set(group) == {accuracy} for group in values)
