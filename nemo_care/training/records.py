"""The records of a step: one row per completion, and metrics computed from the rows."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.evaluation.judges import rule_verdict
from nemo_care.groups.answer_span import token_texts
from nemo_care.groups.group import Completion, Group, known
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


def _numbers(values: torch.Tensor) -> list[float | None]:
    """JSON numbers of a vector, to four decimals; None for what is not finite."""
    return [round(value, 4) + 0.0 if math.isfinite(value) else None for value in values.tolist()]


def _question(group: Group) -> Row:
    """What the model was asked, and what it saw; the files themselves are not copied."""
    prompt, sample = group.prompt, group.prompt.sample
    return {
        "question": sample.question,
        "options": dict(sample.options),
        "solution": sample.solution,
        "problem_type": sample.problem_type,
        "videos": [str(path) for path in sample.videos],
        "images": [str(path) for path in sample.images],
        "frame_times": [list(times) for times in prompt.frame_times],
    }


def _tokens(completion: Completion, tokenizer: ChatTokenizer) -> Row:
    """Text and log-probability (when it was sampled) of each token, that of its end too."""
    return {
        "token_texts": token_texts(tokenizer.base, completion.token_ids),
        "log_probs": _numbers(completion.log_probs),
    }


def completion_rows(
    groups: Sequence[Group], judge: str, tokenizer: ChatTokenizer | None = None
) -> list[Row]:
    """Return one row per completion, as in `rollouts/`; `judge` is the recipe's.

    `accuracy` and `format` are None if they are not among the recipe's rewards. `used` exists only
    with dynamic sampling: whether the step trained on the group. `pair_likelihood`, the likelihood
    of this answer after each reasoning of the group, exists if the bonus needs it; `token_texts`
    and `log_probs` with a `tokenizer` (rollout.record_log_probs).
    """
    questions = [_question(group) for group in groups]
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
            **(
                {}
                if group.pair_likelihood is None
                else {"pair_likelihood": _numbers(group.pair_likelihood[place])}
            ),
            **({} if tokenizer is None else _tokens(completion, tokenizer)),
            **question,
        }
        for group, question in zip(groups, questions, strict=True)
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
