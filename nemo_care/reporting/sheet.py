"""Tables of texts, for the terminal, for Markdown and for pages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nemo_care.process.screen import plain

if TYPE_CHECKING:
    from rich.table import Table

# In the terminal: width of a column of numbers with its padding, and the limit for a row's name.
_CELL_WIDTH = 6
NAME_WIDTH = 24


@dataclass(frozen=True)
class Cell:
    """A number with additions beside it; in the terminal below it, which keeps columns narrow."""

    value: str
    spread: str = ""
    count: str = ""

    def line(self) -> str:
        """Return the cell as one line."""
        text = f"{self.value} ± {self.spread}" if self.spread else self.value
        return f"{text} ({self.count})" if self.count else text

    def stacked(self) -> str:
        """Return the cell with a line for each of its parts."""
        spread = f"±{self.spread}" if self.spread else ""
        return "\n".join(part for part in (self.value, spread, self.count) if part)


@dataclass(frozen=True)
class Row:
    """A row: texts on the left, numbers on the right."""

    labels: list[str]
    cells: list[Cell] = field(default_factory=list)
    strong: bool = False
    """Printed bold, such as a mean."""


@dataclass(frozen=True)
class Sheet:
    """A table."""

    title: str
    labels: list[str]
    """Headings of the text columns."""
    columns: list[tuple[str, str]]
    """Headings of the number columns: the full one, and a short one for the terminal."""
    groups: list[list[Row]]
    """Groups of rows; in the terminal the first of several labels is shown once per group."""

    @property
    def rows(self) -> list[Row]:
        """Return all rows."""
        return [row for group in self.groups for row in group]

    def lines(self) -> list[list[str]]:
        """Return the heading and all rows, each cell in one line."""
        heading = [*self.labels, *(long for long, _ in self.columns)]
        rows = ([*row.labels, *(cell.line() for cell in row.cells)] for row in self.rows)
        return [heading, *rows]

    def markdown(self) -> str:
        """Return the table in Markdown."""
        rule = ["---"] * len(self.labels) + ["---:"] * len(self.columns)
        heading, *lines = self.lines()
        lines = [
            [f"**{cell}**" for cell in line] if row.strong else line
            for row, line in zip(self.rows, lines, strict=True)
        ]
        return "\n".join(map(_markdown_row, [heading, rule, *lines]))

    def pieces(self, width: int) -> Iterator[Sheet]:
        """Split the table into tables that fit a terminal of this width, one below the other.

        Only the first text column is kept: explanations of rows are for the page.
        """
        named = min(NAME_WIDTH, max((len(row.labels[0]) for row in self.rows), default=0))
        fit = max(1, (width - named - 3) // _CELL_WIDTH)
        count = math.ceil(len(self.columns) / fit)
        fit = math.ceil(len(self.columns) / count) if count else 1
        for first in range(0, len(self.columns), fit):
            part = slice(first, first + fit)
            groups = [
                [Row(row.labels[:1], row.cells[part], row.strong) for row in group]
                for group in self.groups
            ]
            title = "" if first else self.title
            yield Sheet(title, self.labels[:1], self.columns[part], groups)

    def rich(self, name_width: int | None = None) -> Table:
        """Return the table for a terminal; `name_width` limits the width of the first column."""
        table = new_table(self.title)
        for place, label in enumerate(self.labels):
            table.add_column(label, overflow="fold", max_width=None if place else name_width)
        for _, short in self.columns:
            table.add_column(plain(short), justify="right", no_wrap=True)
        for group in self.groups:
            for place, row in enumerate(group):
                repeated = place > 0 and len(self.labels) > 1
                labels = ["", *row.labels[1:]] if repeated else row.labels
                texts = [*labels, *(cell.stacked() for cell in row.cells)]
                table.add_row(*map(plain, texts), style="bold" if row.strong else None)
            table.add_section()
        return table


def new_table(title: str) -> Table:
    """Return an empty table for a terminal, so narrow that four levels' numbers fit 80 columns."""
    from rich import box
    from rich.table import Table

    return Table(
        title=plain(title, "table.title") if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
