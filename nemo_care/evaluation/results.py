"""Compute the results of a level from its rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_care.evaluation.rows import Row
from nemo_care.objective.statistics import bootstrap_interval, mean_of_known
from nemo_care.objective.text import extract_answer

Results = dict[str, Any]

# Measures of whether reasoning and answer agree, for well-formed completions, by their column.
_AGREEMENTS: Mapping[str, str] = {
    "consistency_rate": "consistent",
    "consistency_rate_rule": "consistent_rule",
    "consistency_rate_likelihood": "consistent_likelihood",
    "implied_rate": "implied_answer",
    "shuffle_rate": "shuffle_follows",
}

# For all prompts that have one.
_PROBES = ("probe_implied", "probe_true", "peer_probe")


def level_results(rows: Sequence[Row], *, skipped: int, judged: bool) -> Results:
    """Return the results of a level's completions; None where nothing has a value.

    Means over all completions: `accuracy`, `format_rate`, `completion_tokens`. Means over the
    well-formed ones: `consistency_rate` (of those with a verdict), `reasoning_words`, and, of those
    that are also right (accuracy 1), `consistency_among_correct`. `count` completions, `skipped`
    samples without one, and `unjudged` completions without a verdict although there is a judge
    (`judged`). Further measures (see `measure_values`) are included if they were measured,
    `by_task_type` if samples have one.

    `intervals` has for each measure the number of completions with a value (`count`), the 95%
    bootstrap interval of their mean over prompts (`low`, `high`) and, for yes-or-no measures like
    the judge's, `agreement`: the share of completions on which they agree with the judge.
    """
    well_formed = [row for row in rows if row["format"] == 1]
    values = measure_values(rows)
    measured = {name: mean_of_known(parts) for name, parts in values.items()}
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
    results |= {name: mean for name, mean in measured.items() if name not in results}
    verdicts = values["consistency_rate"]
    results["intervals"] = {
        name: _interval(parts, verdicts if name in _AGREEMENTS and parts is not verdicts else None)
        for name, parts in values.items()
    }
    by_task_type = {
        task_type: _rates([row for row in rows if row["task_type"] == task_type])
        for task_type in sorted({row["task_type"] for row in rows if row["task_type"]})
    }
    return {**results, "by_task_type": by_task_type} if by_task_type else results


def measure_values(rows: Sequence[Row]) -> dict[str, list[float | None]]:
    """Return each measure of the rows by its name: one value per row, None if it has none.

    `consistency_rate` is the judge's, `consistency_rate_NAME` that of a further judge.
    `implied_rate`: the answer that a judge infers from the reasoning is the given one.
    `shuffle_rate`: the answer follows its option's text to another letter. `probe_implied`,
    `probe_true`: the forced-reasoning probe. `peer_probe`: log-probability of an answer given its
    own reasoning minus that given another completion's.
    """
    values: dict[str, list[float | None]] = {"accuracy": [row["accuracy"] for row in rows]}
    for name, column in _AGREEMENTS.items():
        if name == "consistency_rate" or any(column in row for row in rows):
            values[name] = [
                _agrees(row, column) if row["format"] == 1 and column in row else None
                for row in rows
            ]
    for name in _PROBES:
        if any(name in row for row in rows):
            values[name] = [row.get(name) for row in rows]
    return values


def _agrees(row: Row, column: str) -> bool | None:
    if column != "implied_answer":
        return row[column]
    # A reasoning that implies no answer does not imply the given one.
    return row[column] is not None and row[column] == extract_answer(row["completion"])


def _interval(values: Sequence[float | None], verdicts: Sequence[float | None] | None) -> Results:
    """Return the interval of a measure; `verdicts` are the judge's, for the agreement."""
    known = [float(value) for value in values if value is not None]
    low, high = bootstrap_interval(known) or (None, None)
    interval: Results = {"count": len(known), "low": low, "high": high}
    if verdicts is not None:
        interval["agreement"] = mean_of_known(
            mine == verdict
            for mine, verdict in zip(values, verdicts, strict=True)
            if mine is not None and verdict is not None
        )
    return interval


def _rates(rows: Sequence[Row]) -> Results:
    return {
        "accuracy": mean_of_known(row["accuracy"] for row in rows),
        "consistency_rate": mean_of_known(row["consistent"] for row in rows if row["format"] == 1),
        "format_rate": mean_of_known(row["format"] for row in rows),
        "count": len(rows),
    }
