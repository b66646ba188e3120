"""One row per completion: what an evaluation writes, and what results are computed from."""

from typing import Any

from nemo_care.files.json_lines import Kinds
from nemo_care.groups.group import Group
from nemo_care.objective.rewards import evaluation_accuracy, format_reward
from nemo_care.objective.text import parse_completion

Row = dict[str, Any]

# The fields that results need, for checking rows that are read back.
ROW: Kinds = {
    "index": int,
    "task_type": str,
    "completion": str,
    "tokens": int,
    "accuracy": float | None,
    "format": int,
    "reasoning_words": int,
    "consistent": bool | None,
}
MEASURED: Kinds = {
    "probe_implied": float | None,
    "probe_true": float | None,
    "shuffle_follows": bool | None,
    "peer_probe": float | None,
    "consistent_rule": bool | None,
    "consistent_likelihood": bool | None,
    "implied_answer": str | None,
}


def completion_row(group: Group, *, min_reasoning_words: int, untagged_counts: bool) -> Row:
    """Return the row of a group's only completion, without a verdict yet.

    `untagged_counts`: the whole text of a completion without an answer is scored as its answer.
    `format` is 0 or 1, `reasoning_words` counts the words between the think tags, `ended`: whether
    the completion ended within its token limit.
    """
    sample, completion = group.prompt.sample, group.completions[0]
    text = completion.text
    return {
        "index": group.prompt.index,
        "sample_id": sample.sample_id,
        "task_type": sample.task_type,
        "problem_type": sample.problem_type,
        "solution": sample.solution,
        "completion": text,
        "tokens": completion.length,
        "ended": completion.ended,
        "accuracy": evaluation_accuracy(
            sample.problem_type, text, sample.solution, untagged_counts=untagged_counts
        ),
        "format": int(format_reward(text, min_reasoning_words=min_reasoning_words)),
        "reasoning_words": len((parse_completion(text).reasoning or "").split()),
        "consistent": None,
    }
