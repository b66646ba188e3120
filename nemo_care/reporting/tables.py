"""Validation results as tables, and what has to be said beside them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_care.process.screen import plain
from nemo_care.runs.reader import Levels, RunRecord, number

if TYPE_CHECKING:
    from rich.table import Table

# Key of a level's results -> heading.
COLUMNS: Mapping[str, str] = {
    "accuracy": "accuracy",
    "consistency_rate": "consistency",
    "probe_implied": "probe implied",
    "probe_true": "probe true",
    "format_rate": "format",
}

# Of a level's `intervals`, for the table of measures: key -> heading.
MEASURES: Mapping[str, str] = {
    "accuracy": "accuracy",
    "consistency_rate": "judge",
    "consistency_rate_rule": "rule",
    "consistency_rate_likelihood": "likelihood",
    "implied_rate": "implied answer",
    "shuffle_rate": "option shuffle",
    "peer_probe": "peer probe",
    "probe_implied": "probe implied",
    "probe_true": "probe true",
}

_PROBE_NOTE = (
    "Consistency is agreement: the reasoning supports the answer given. Whether the reasoning "
    "causes the answer is what the probe asks: a wrong reasoning is forced on the model, and "
    '"probe implied" is the mean probability of the letter which it implies, "probe true" that '
    "of the true letter."
)
_MINIATURE_NOTE = (
    "The miniature's short cut from video to answer, and so the inconsistency of plain GRPO, was "
    "planted by the warm start of its tiny model. It shows the mechanism, not its size on a real "
    "model."
)


def rate(value: Any) -> str:
    """A rate or probability with two decimals; a dash where there is none."""
    known = number(value)
    return "–" if math.isnan(known) else f"{known:.2f}"


def level_names(*results: Levels | None) -> list[str]:
    """Names of the levels that occur, in their order."""
    return list(dict.fromkeys(name for levels in results if levels for name in levels))


def level_number(levels: Levels | None, level: str, key: str) -> float:
    """One number of a validation; NaN where there is none."""
    return number((levels or {}).get(level, {}).get(key))


def known_numbers(results: Iterable[Levels | None], level: str, key: str) -> list[float]:
    """One number of several validations, of those that have it."""
    values = [level_number(levels, level, key) for levels in results]
    return [value for value in values if not math.isnan(value)]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; NaN where there are too few values."""
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def summary_by_level(
    results: Sequence[Levels | None], keys: Iterable[str] = COLUMNS
) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean, sample standard deviation and count of each level's numbers, for JSON."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    keys = list(keys)
    for level in level_names(*results):
        for key in keys:
            known = known_numbers(results, level, key)
            if known:
                mean, spread = mean_and_spread(known)
                table.setdefault(level, {})[key] = {
                    "mean": mean,
                    "std": None if math.isnan(spread) else spread,
                    "seeds": len(known),
                }
    return table


def markdown_row(cells: Iterable[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def present(key: str, results: Sequence[Levels | None]) -> bool:
    """Whether any level has a value for `key`."""
    return any(
        not math.isnan(number(level.get(key)))
        for levels in results
        if levels
        for level in levels.values()
    )


def shown_columns(start: Levels | None, end: Levels | None) -> list[str]:
    """Keys worth a column: accuracy, consistency and format always, the probe where measured."""
    results = [start, end]
    return [key for key in COLUMNS if not key.startswith("probe") or present(key, results)]


def change(start: Levels | None, end: Levels | None, level: str, key: str) -> str:
    """ "start → end" of one value, or the one there is."""
    sides = [rate(levels.get(level, {}).get(key)) for levels in (start, end) if levels]
    return " → ".join(sides) or "–"


def validation_table(start: Levels | None, end: Levels | None) -> Table:
    """Start against end by level; either may be None, then the other stands alone."""
    from rich import box
    from rich.table import Table

    what = "start → end" if start and end else "end" if end else "start"
    table = Table(
        title=f"Validation: {what}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # fits 80 columns
    )
    table.add_column("level")
    columns = shown_columns(start, end)
    for key in columns:
        table.add_column(COLUMNS[key], justify="right", no_wrap=True)
    for level in level_names(start, end):
        table.add_row(plain(level), *(change(start, end, level, key) for key in columns))
    return table


def evaluation_table(levels: Levels) -> Table:
    """Results of one model by level, and below each by task type where its samples have one."""
    from rich import box
    from rich.table import Table

    table = Table(
        title="Evaluation", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("level")
    columns = shown_columns(levels, None)
    for key in columns:
        table.add_column(COLUMNS[key], justify="right", no_wrap=True)
    table.add_column("count", justify="right")

    def add(name: str, result: Mapping[str, Any]) -> None:
        values = [rate(result.get(key)) for key in columns]
        table.add_row(plain(name), *values, str(result.get("count", "–")))

    for level, result in levels.items():
        add(level, result)
        for task_type, part in result.get("by_task_type", {}).items():
            add(f"  {task_type}", part)
    return table


def measures_table(levels: Levels) -> Table:
    """Every measure of one model by level: mean, 95% interval, count, agreement with the judge."""
    from rich import box
    from rich.table import Table

    table = Table(title="Measures", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in ("level", "measure"):
        table.add_column(heading, no_wrap=True)
    for heading in ("mean", "95% interval", "count", "as the judge"):
        table.add_column(heading, justify="right", no_wrap=True)
    for level, result in levels.items():
        intervals = result.get("intervals", {})
        for key in filter(intervals.__contains__, MEASURES):
            part = intervals[key]
            if not part["count"]:
                continue
            table.add_row(
                plain(level),
                MEASURES[key],
                rate(result.get(key)),
                f"{rate(part['low'])} to {rate(part['high'])}",
                str(part["count"]),
                rate(part.get("agreement")),
            )
    return table


def reading_notes(results: Sequence[Levels | None], data: Any) -> list[str]:
    """What a reader of validation results on this kind of data has to know to read them rightly."""
    notes = []
    if present("probe_implied", results):
        notes.append(_PROBE_NOTE)
    if data == "miniature":
        notes.append(_MINIATURE_NOTE)
    return notes


def result_notes(run: RunRecord) -> list[str]:
    """The notes of one run."""
    return reading_notes([run.start, run.end], run.setting("data.train.kind"))
