"""The tables of a study: for the terminal, for Markdown and for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_care.experiments.config import START
from nemo_care.experiments.findings import Findings, Place, median
from nemo_care.process.screen import plain
from nemo_care.reporting.report import duration
from nemo_care.reporting.tables import (
    COLUMNS,
    level_number,
    markdown_row,
    mean_and_spread,
    rate,
)

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = {
    **COLUMNS,
    "consistency_among_correct": "consistency of the right ones",
    "reasoning_words": "reasoning words",
}
_SHORT = {
    "accuracy": "acc",
    "consistency_rate": "cons",
    "consistency_among_correct": "cons\nright",
    "probe_implied": "probe\nimpl.",
    "probe_true": "probe\ntrue",
    "reasoning_words": "words",
    "format_rate": "form",
}
KEYS = tuple(_SHORT)
# A column of numbers and the room beside it on the terminal, and what the first columns may take.
_CELL_WIDTH = 6
_NAME_WIDTH = 24


@dataclass(frozen=True)
class Cell:
    """A number, and what stands beside it; on the terminal below, which keeps columns narrow."""

    value: str
    spread: str = ""
    count: str = ""

    def line(self) -> str:
        """In one line."""
        text = f"{self.value} ± {self.spread}" if self.spread else self.value
        return f"{text} ({self.count})" if self.count else text

    def stacked(self) -> str:
        """In as many lines as it has parts."""
        spread = f"±{self.spread}" if self.spread else ""
        return "\n".join(part for part in (self.value, spread, self.count) if part)


@dataclass(frozen=True)
class Sheet:
    """A table."""

    title: str
    labels: list[str]
    """Headings of the columns of text on the left."""
    columns: list[tuple[str, str]]
    """Headings of the columns of numbers, and what the terminal has in their place."""
    rows: list[tuple[list[str], list[Cell]]]

    def heading(self) -> list[str]:
        """All headings."""
        return [*self.labels, *(long for long, _ in self.columns)]

    def text_rows(self) -> list[list[str]]:
        """All rows, a line of text in each cell."""
        return [[*labels, *(cell.line() for cell in cells)] for labels, cells in self.rows]

    def markdown(self) -> str:
        """The table in Markdown."""
        rule = ["---"] * len(self.labels) + ["---:"] * len(self.columns)
        return "\n".join(map(markdown_row, [self.heading(), rule, *self.text_rows()]))

    def rich(self, width: int) -> list[Table]:
        """The table for a terminal, in as many pieces as its width asks for.

        Only the first column of text is there: what explains a row is for the page.
        """
        from rich import box
        from rich.table import Table

        named = min(_NAME_WIDTH, max([len(labels[0]) for labels, _ in self.rows], default=0))
        fit = max(1, (width - named - 3) // _CELL_WIDTH)
        pieces = math.ceil(len(self.columns) / fit)
        fit = math.ceil(len(self.columns) / pieces)
        tables = []
        for first in range(0, len(self.columns), fit):
            table = Table(
                title=plain(self.title, "table.title") if first == 0 else None,
                title_justify="left",
                box=box.SIMPLE_HEAD,
                padding=(0, 1, 0, 0),
            )
            table.add_column(self.labels[0], overflow="fold", max_width=_NAME_WIDTH)
            for _, short in self.columns[first : first + fit]:
                table.add_column(plain(short), justify="right", no_wrap=True)
            for labels, cells in self.rows:
                shown = (plain(cell.stacked()) for cell in cells[first : first + fit])
                table.add_row(plain(labels[0]), *shown)
            tables.append(table)
        return tables


def main_sheet(findings: Findings) -> Sheet:
    """Every variant's means, below those of the start."""
    places = _places(findings)
    rows = []
    for name in (START, *findings.study.variants):
        ends = list(findings.ends(name).values())
        cells = [_mean([level_number(end, *place) for end in ends], place) for place in places]
        rows.append(([findings.title_of(name)], [*cells, Cell(_seeds(findings, name))]))
    return Sheet(
        findings.study.title, ["variant"], [*map(_heading, places), ("seeds", "seeds")], rows
    )


def seeds_sheet(findings: Findings) -> Sheet:
    """Every seed of every variant."""
    places = _places(findings)
    rows = [
        (
            [findings.title_of(name), str(seed)],
            [Cell(_text(level_number(end, *place), place)) for place in places],
        )
        for name in (START, *findings.study.variants)
        for seed, end in findings.ends(name).items()
    ]
    return Sheet("Every seed", ["variant", "seed"], [*map(_heading, places)], rows)


def contrasted_places(findings: Findings) -> list[Place]:
    """The numbers in which contrasts are shown."""
    return [
        *findings.places("accuracy", findings.levels),
        *findings.places("consistency_rate", findings.levels),
        # The probe asks about the model, not about the data: one level is enough here.
        *findings.places("probe_implied", findings.levels[:1]),
    ]


def contrasts_sheet(findings: Findings) -> Sheet:
    """Differences of two variants, paired by seed."""
    places = contrasted_places(findings)
    rows = []
    for one in findings.study.contrasts:
        name = f"{findings.title_of(one.left)} − {findings.title_of(one.right)}"
        cells = []
        for place in places:
            difference = findings.difference(one, place)
            mean, spread = mean_and_spread(difference.values)
            if math.isnan(mean):
                cells.append(Cell("–"))
                continue
            deviation = "" if math.isnan(spread) else f"{spread:.2f}"
            of = f"{difference.positive}/{len(difference.values)}"
            cells.append(Cell(_signed(mean), deviation, of))
        rows.append(([name, one.about], cells))
    title = "Differences, paired by seed (in how many seeds the difference is positive)"
    return Sheet(title, ["difference", "about"], [*map(_heading, places)], rows)


def time_sheet(findings: Findings) -> Sheet:
    """How long the runs took."""
    rows = []
    for name in findings.study.variants:
        runs = list(findings.of(name).values())
        steps = sorted({one.steps for one in runs if one.steps is not None})
        wall = median(one.wall_seconds for one in runs)
        step = median(one.seconds_per_step for one in runs)
        cells = [
            "/".join(map(str, steps)) or "–",
            "–" if wall is None else duration(wall),
            "–" if step is None else f"{step:.2f} s",
            _seeds(findings, name),
        ]
        rows.append(([findings.title_of(name)], [*map(Cell, cells)]))
    headings = ("steps", "wall time of a run (median)", "time of a step (median)", "seeds")
    return Sheet("Time", ["variant"], [(heading, heading) for heading in headings], rows)


def variants_sheet(findings: Findings) -> Sheet:
    """What the variants are."""
    study = findings.study
    rows: list[tuple[list[str], list[Cell]]] = [
        ([study.title_of(name), variant.about, " ".join(variant.overrides) or "–"], [])
        for name, variant in study.variants.items()
    ]
    return Sheet("Variants", ["variant", "about", f"overrides of {study.recipe}"], [], rows)


def _places(findings: Findings) -> list[Place]:
    levels = findings.levels
    ends = [*levels[:1], *levels[-1:]]
    return [
        *findings.places("accuracy", levels),
        *findings.places("consistency_rate", levels),
        *findings.places("consistency_among_correct", ends),
        *(
            place
            for key in ("probe_implied", "probe_true", "reasoning_words", "format_rate")
            for place in findings.places(key, levels[:1])
        ),
    ]


def _heading(place: Place) -> tuple[str, str]:
    level, key = place
    return f"{level} {_HEADINGS[key]}", f"{level}\n{_SHORT[key]}"


def _text(value: float, place: Place) -> str:
    if place[1] == "reasoning_words" and not math.isnan(value):
        return f"{value:.1f}"
    return rate(value)


def _mean(values: Sequence[float], place: Place) -> Cell:
    known = [value for value in values if not math.isnan(value)]
    mean, spread = mean_and_spread(known)
    return Cell(_text(mean, place), "" if math.isnan(spread) else _text(spread, place))


def _signed(value: float) -> str:
    text = f"{value:+.2f}"
    return "0.00" if float(text) == 0 else text.replace("-", "−")


def _seeds(findings: Findings, name: str) -> str:
    done, planned = len(findings.ends(name)), findings.planned(name)
    return str(done) if done == planned else f"{done} of {planned}"
