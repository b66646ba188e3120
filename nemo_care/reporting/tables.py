"""Validation results as tables, and the notes that accompany them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nemo_care.reporting.sheet import Cell, Row, Sheet
from nemo_care.runs.reader import Levels, RunRecord, number

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table

# Key of a level's results -> heading.
COLUMNS: Mapping[str, str] = {
    "accuracy": "accuracy",
    "consistency_rate": "consistency",
    "probe_implied": "probe implied",
    "probe_true": "probe true",
    "format_rate": "format",
}

# Keys of a level's `intervals` in the table of measures, with their headings.
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
    "Consistency is agreement: the reasoning supports the answer given. The probe tests whether "
    "the reasoning causes the answer: a wrong reasoning is forced on the model. "
    '"probe implied" is the mean probability of the letter that it implies, "probe true" that of '
    "the true letter."
)
_MINIATURE_NOTE = (
    "The miniature's short cut from video to answer, and so the inconsistency of plain GRPO, was "
    "planted by the warm start of its tiny model. It shows the mechanism, not its size on a real "
    "model."
)


def rate(value: Any) -> str:
    """Format a rate or probability with two decimals; a dash if there is none."""
    known = number(value)
    return "–" if math.isnan(known) else f"{known:.2f}"


def level_names(*results: Levels | None) -> list[str]:
    """Return the names of the levels that occur, in order."""
    return list(dict.fromkeys(name for levels in results if levels for name in levels))


def numbers(
    results: Mapping[Any, Levels | None],
    levels: Sequence[str] | None = None,
    keys: Iterable[str] = COLUMNS,
) -> DataFrame:
    """Return the numbers of several validations: one row each, a column for each level and key.

    NaN if a validation has no such number. `levels` are by default all that occur.
    """
    import pandas as pd

    names = level_names(*results.values()) if levels is None else levels
    columns = pd.MultiIndex.from_product([names, list(keys)])
    rows = [
        [number((validation or {}).get(level, {}).get(key)) for level, key in columns]
        for validation in results.values()
    ]
    return pd.DataFrame(rows, index=list(results), columns=columns, dtype=float)


def summary(frame: DataFrame) -> dict[str, dict[str, dict[str, Any]]]:
    """Return mean, sample standard deviation and count of each level's `numbers`, for JSON."""
    table: dict[str, dict[str, dict[str, Any]]] = {}
    means, spreads, counts = frame.mean(), frame.std(), frame.count()
    for place in counts.index[counts > 0]:
        level, key = place
        table.setdefault(level, {})[key] = {
            "mean": known(means[place]),
            "std": known(spreads[place]),
            "seeds": int(counts[place]),
        }
    return table


def known(value: float) -> float | None:
    """Return a number for JSON, which has no NaN."""
    return None if math.isnan(value) else float(value)


def present(key: str, results: Sequence[Levels | None]) -> bool:
    """Whether any level has a value for `key`."""
    return any(
        not math.isnan(number(level.get(key)))
        for levels in results
        if levels
        for level in levels.values()
    )


def _shown_columns(*results: Levels | None) -> list[str]:
    """Return the keys to show: accuracy, consistency and format always, the probe if measured."""
    return [key for key in COLUMNS if not key.startswith("probe") or present(key, results)]


def validation_sheet(start: Levels | None, end: Levels | None, *, prompts: bool = False) -> Sheet:
    """Compare start and end by level; either can be None. `prompts` adds each level's size."""
    sides = [levels for levels in (start, end) if levels]
    keys = _shown_columns(*sides)
    rows = []
    for level in level_names(*sides):
        texts = [" → ".join(rate(side.get(level, {}).get(key)) for side in sides) for key in keys]
        if prompts:
            texts.append(str((end or start or {}).get(level, {}).get("count") or "–"))
        rows.append(Row([level], [*map(Cell, texts)]))
    what = "start → end" if start and end else "end" if end else "start"
    headings = [*(COLUMNS[key] for key in keys), *(["prompts"] if prompts else [])]
    return Sheet(f"Validation: {what}", ["level"], [(text, text) for text in headings], [rows])


def validation_table(start: Levels | None, end: Levels | None) -> Table:
    """Compare start and end by level; if one is None, only the other is shown."""
    return validation_sheet(start, end).rich()


def evaluation_table(levels: Levels) -> Table:
    """Show results of one model by level, followed by its task types if the samples have them."""
    keys = _shown_columns(levels)
    named: list[tuple[str, Mapping[str, Any]]] = []
    for level, result in levels.items():
        named.append((level, result))
        named += [(f"  {name}", part) for name, part in result.get("by_task_type", {}).items()]
    rows = [
        Row(
            [name],
            [*(Cell(rate(part.get(key))) for key in keys), Cell(str(part.get("count", "–")))],
        )
        for name, part in named
    ]
    headings = [*(COLUMNS[key] for key in keys), "count"]
    return Sheet("Evaluation", ["level"], [(text, text) for text in headings], [rows]).rich()


def measures_table(levels: Levels) -> Table:
    """Show every measure of a model by level: mean, 95% interval, count, agreement with judge."""
    groups: list[list[Row]] = []
    for level, result in levels.items():
        intervals = result.get("intervals", {})
        group = []
        for key in filter(intervals.__contains__, MEASURES):
            part = intervals[key]
            if not part["count"]:
                continue
            cells = (
                rate(result.get(key)),
                f"{rate(part['low'])} to {rate(part['high'])}",
                str(part["count"]),
                rate(part.get("agreement")),
            )
            group.append(Row([level, MEASURES[key]], [Cell(text) for text in cells]))
        groups.append(group)
    headings = ("mean", "95% interval", "count", "as the judge")
    columns = [(text, text) for text in headings]
    return Sheet("Measures", ["level", "measure"], columns, groups).rich()


def reading_notes(results: Sequence[Levels | None], data: Any) -> list[str]:
    """Return notes that readers need to interpret validation results on this kind of data."""
    notes = []
    if present("probe_implied", results):
        notes.append(_PROBE_NOTE)
    if data == "miniature":
        notes.append(_MINIATURE_NOTE)
    return notes


def result_notes(run: RunRecord) -> list[str]:
    """Return the notes of one run."""
    return reading_notes([run.start, run.end], run.setting("data.train.kind"))
