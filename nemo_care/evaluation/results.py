"""From the rows of a level to its results."""

from collections.abc import Sequence
from typing import Any

from nemo_care.evaluation.rows import Row
from nemo_care.objective.statistics import mean_of_known

Results = dict[str, Any]

_PROBE = ("probe_implied", "probe_true")


def level_results(rows: Sequence[Row], *, skipped: int, judged: bool) -> Results:
    """What a level's completions show; None where nothing has a value.

    Means over all completions: `accuracy`, `format_rate`, `completion_tokens`. Means over the
    well-formed ones: `consistency_rate` (of those with a verdict), `reasoning_words`, and, of those
    that are also right (accuracy 1), `consistency_among_correct`. `count` completions, `skipped`
    samples without one, and `unjudged` completions without a verdict although a judge was asked
    (`judged`). `probe_implied` and `probe_true` are there where the probe was on, `by_task_type`
    where samples have one.
    """
    well_formed = [row for row in rows if row["format"] == 1]
    results: Results = {
        **_rates(rows),
        "consistency_among_correct": mean_of_known(
            row["consistent"] for row in well_formed if row["accuracy"] == 1
        ),
        "reasoning_words": mean_of_known(row["reasoning_words"] for row in well_formed),
        "completion_tokens": mean_of_known(row["tokens"] for row in rows),
        "skipped": skipped,
        "unjudged": sum(row["consistent"] is None for row in rows) if judged else None,
    }
    for name in _PROBE:
        if any(name in row for row in rows):
            results[name] = mean_of_known(row[name] for row in rows)
    by_task_type = {
        task_type: _rates([row for row in rows if row["task_type"] == task_type])
        for task_type in sorted({row["task_type"] for row in rows if row["task_type"]})
    }
    return {**results, "by_task_type": by_task_type} if by_task_type else results


def _rates(rows: Sequence[Row]) -> Results:
    return {
        "accuracy": mean_of_known(row["accuracy"] for row in rows),
        "consistency_rate": mean_of_known(row["consistent"] for row in rows if row["format"] == 1),
        "format_rate": mean_of_known(row["format"] for row in rows),
        "count": len(rows),
    }
