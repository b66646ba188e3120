"""The tables of a study and of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nemo_care.experiments.findings import (
    ACCURACY,
    CONSISTENCY,
    CONSISTENCY_OF_RIGHT,
    FORMAT,
    PROBE,
    PROBE_TRUE,
    WORDS,
    Findings,
    Place,
)
from nemo_care.process.screen import one_line
from nemo_care.reporting.report import duration
from nemo_care.reporting.sheet import Cell, Row, Sheet
from nemo_care.reporting.tables import COLUMNS, rate

if TYPE_CHECKING:
    from pandas import DataFrame

_HEADINGS = {
    **COLUMNS,
    CONSISTENCY_OF_RIGHT: "consistency of correct answers",
    WORDS: "reasoning words",
}
_SHORT = {
    ACCURACY: "acc",
    CONSISTENCY: "cons",
    CONSISTENCY_OF_RIGHT: "cons\nright",
    PROBE: "probe\nimpl.",
    PROBE_TRUE: "probe\ntrue",
    WORDS: "words",
    FORMAT: "form",
}


def main_sheet(findings: Findings) -> Sheet:
    """Make the table of every variant's means, below those of the start."""
    places = _places(findings)
    rows = []
    for name in (*findings.starts, *findings.study.variants):
        means = _means(findings.ends(name), places)
        rows.append(Row([findings.title_of(name)], [*means, Cell(_seeds(findings, name))]))
    columns = [*map(_heading, places), ("seeds", "seeds")]
    return Sheet(findings.study.title, ["variant"], columns, [rows])


def seeds_sheet(findings: Findings) -> Sheet:
    """Make the table of every seed of every variant."""
    places = _places(findings)
    rows = [
        Row([findings.title_of(name), str(seed)], _values(values, places))
        for name in (*findings.starts, *findings.study.variants)
        for seed, values in findings.ends(name).iterrows()
    ]
    return Sheet("Every seed", ["variant", "seed"], [*map(_heading, places)], [rows])


def contrasts_sheet(findings: Findings) -> Sheet:
    """Make the table of differences between two variants, paired by seed."""
    places = findings.compared()
    rows = []
    for one in findings.study.contrasts:
        name = f"{findings.title_of(one.left)} − {findings.title_of(one.right)}"
        differences = findings.differences(one)
        cells = []
        for place in places:
            values = differences[place].dropna()
            of = f"{(values > 0).sum()}/{len(values)}"
            spread = "" if len(values) < 2 else f"{values.std():.2f}"
            cells.append(Cell(_signed(values.mean()), spread, of) if len(values) else Cell("–"))
        rows.append(Row([name, one.about], cells))
    title = "Differences, paired by seed (in how many seeds the difference is positive)"
    return Sheet(title, ["difference", "about"], [*map(_heading, places)], [rows])


def time_sheet(findings: Findings) -> Sheet:
    """Make the table of the runs' times."""
    rows = []
    for name in findings.study.variants:
        times = findings.times(name)
        usual = times.median()
        wall, step = usual["wall_seconds"], usual["seconds_per_step"]
        texts = [
            "/".join(f"{steps:.0f}" for steps in sorted(times["steps"].dropna().unique())) or "–",
            "–" if math.isnan(wall) else duration(wall),
            "–" if math.isnan(step) else f"{step:.2f} s",
            _seeds(findings, name),
        ]
        rows.append(Row([findings.title_of(name)], [*map(Cell, texts)]))
    headings = ("steps", "wall time of a run (median)", "time of a step (median)", "seeds")
    return Sheet("Time", ["variant"], [(heading, heading) for heading in headings], [rows])


def variants_sheet(findings: Findings) -> Sheet:
    """Make the table that describes the variants."""
    study = findings.study
    rows = []
    for name, variant in study.variants.items():
        own = [f"--config-name {variant.recipe}"] if variant.recipe else []
        overrides = " ".join([*own, *variant.overrides]) or "–"
        rows.append(Row([study.title_of(name), variant.about, overrides]))
    return Sheet("Variants", ["variant", "about", f"overrides of {study.recipe}"], [], [rows])


def comparison_sheet(findings: Findings) -> Sheet:
    """Make the table of every seed of every recipe and their means, below those of the start."""
    probed = [place for place in findings.compared() if place[1] == PROBE]
    places = [(level, key) for key in (ACCURACY, CONSISTENCY) for level in findings.levels] + probed
    groups = [
        _group(name, starts, [str(seed) for seed in starts.index], len(starts), places)
        for name, starts in _starts(findings, places).items()
    ]
    for recipe in findings.study.variants:
        done, seeds = findings.of(recipe), findings.study.seeds_of(recipe)
        labels = [str(seed) if seed in done else f"{seed}: failed" for seed in seeds]
        validated = sum(bool(one.end) for one in done.values())
        rows = findings.frame({seed: one.end for seed, one in done.items()}).reindex(seeds)
        groups.append(_group(recipe, rows, labels, validated, places))
    columns = [
        (f"{level} {COLUMNS[key]}", f"{one_line(level)}\n{_SHORT[key].split()[0]}")
        for level, key in places
    ]
    return Sheet("", ["run", "seed"], columns, groups)


def _starts(findings: Findings, places: Sequence[Place]) -> dict[str, DataFrame]:
    """Return the start model's results: once if all recipes agree, otherwise by recipe."""
    import pandas as pd

    by_recipe = {}
    for recipe in findings.study.variants:
        starts = {seed: one.start for seed, one in findings.of(recipe).items() if one.start}
        if starts:
            by_recipe[f"start of {recipe}"] = findings.frame(starts)[places].sort_index()
    if not by_recipe:
        return {}
    both = pd.concat(by_recipe.values())
    if (both.map(rate).groupby(level=0).nunique() == 1).all(axis=None):
        by_recipe = {"start": both[~both.index.duplicated()].sort_index()}
    for name, starts in by_recipe.items():
        # Greedy validation of a checkpoint does not depend on the seed: show it once.
        if len(starts) > 1 and len(starts.map(rate).drop_duplicates()) == 1:
            by_recipe[name] = starts.head(1).set_axis(["all"])
    return by_recipe


def _group(
    name: str, rows: DataFrame, labels: Sequence[str], known: int, places: Sequence[Place]
) -> list[Row]:
    """Return a row per seed, and the mean of the `known` seeds."""
    group = [
        Row([name, label], _values(values, places))
        for label, (_, values) in zip(labels, rows.iterrows(), strict=True)
    ]
    if len(group) > 1 and known:
        of = "" if known == len(group) else f" of {known}"
        group.append(Row([name, f"mean{of}"], _means(rows, places), strong=True))
    return group


def _places(findings: Findings) -> list[Place]:
    levels = findings.levels
    ends = [*levels[:1], *levels[-1:]]
    return [
        *findings.places(ACCURACY, levels),
        *findings.places(CONSISTENCY, levels),
        *findings.places(CONSISTENCY_OF_RIGHT, ends),
        *(
            place
            for key in (PROBE, PROBE_TRUE, WORDS, FORMAT)
            for place in findings.places(key, levels[:1])
        ),
    ]


def _heading(place: Place) -> tuple[str, str]:
    level, key = place
    return f"{level} {_HEADINGS[key]}", f"{level}\n{_SHORT[key]}"


def _text(value: float, place: Place) -> str:
    if place[1] == WORDS and not math.isnan(value):
        return f"{value:.1f}"
    return rate(float(value))


def _values(values: Any, places: Sequence[Place]) -> list[Cell]:
    return [Cell(_text(values[place], place)) for place in places]


def _means(frame: DataFrame, places: Sequence[Place]) -> list[Cell]:
    """Format mean and sample standard deviation of each column."""
    means, spreads = frame.mean(), frame.std()
    return [
        Cell(
            _text(means[place], place),
            "" if math.isnan(spreads[place]) else _text(spreads[place], place),
        )
        for place in places
    ]


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def _seeds(findings: Findings, name: str) -> str:
    done, planned = len(findings.ends(name)), findings.planned(name)
    return str(done) if done == planned else f"{done} of {planned}"
