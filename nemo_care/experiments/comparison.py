"""The results of several recipes and seeds as a table, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_care.process.screen import one_line, plain
from nemo_care.reporting.tables import (
    COLUMNS,
    known_numbers,
    level_names,
    markdown_row,
    mean_and_spread,
    rate,
    summary_by_level,
)
from nemo_care.runs.reader import Levels

if TYPE_CHECKING:
    from rich.table import Table

_SHORT = {"accuracy": "acc", "consistency_rate": "cons", "probe_implied": "probe"}


@dataclass(frozen=True)
class Outcome:
    """How one run ended."""

    recipe: str
    seed: int
    folder: str
    """Name of the run directory within the comparison's."""
    status: str
    """ "done", or why there is no result."""
    steps: int | None = None
    wall_seconds: float | None = None
    start: Levels | None = None
    end: Levels | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Block:
    """Rows that belong together: one per seed, and their mean."""

    name: str
    rows: list[tuple[str, Levels | None, str]]
    """Seed, results, and what to say where there are none."""


@dataclass(frozen=True)
class _Row:
    name: str
    seed: str
    values: list[tuple[str, str]]
    """Value and deviation; both as text, the deviation may be empty."""
    is_mean: bool = False


@dataclass(frozen=True)
class Comparison:
    """Outcomes in the order in which they are shown: by recipe, then by seed."""

    outcomes: Sequence[Outcome]
    overrides: Sequence[str] = field(default=())

    def _columns(self) -> list[tuple[str, str]]:
        """Level and key of each column."""
        results = [side for one in self.outcomes for side in (one.start, one.end)]
        levels = level_names(*results)
        columns = [(level, key) for key in ("accuracy", "consistency_rate") for level in levels]
        # The probe asks about the model, not about the data: one level is enough here.
        probed = [
            level
            for level in levels
            if any(known_numbers([result], level, "probe_implied") for result in results)
        ]
        columns.extend((level, "probe_implied") for level in probed[:1])
        return columns

    def _recipes(self) -> dict[str, list[Outcome]]:
        recipes: dict[str, list[Outcome]] = {}
        for one in self.outcomes:
            recipes.setdefault(one.recipe, []).append(one)
        return recipes

    def _starts(self) -> list[_Block]:
        """The start model's results: once where all recipes agree, else by recipe."""
        columns = self._columns()
        by_recipe = {
            recipe: {one.seed: one.start for one in outcomes if one.start}
            for recipe, outcomes in self._recipes().items()
        }
        shared: dict[int, Levels] = {}
        agree = True
        for starts in by_recipe.values():
            for seed, levels in starts.items():
                other = shared.setdefault(seed, levels)
                agree = agree and _values(other, columns) == _values(levels, columns)
        named = {"start": shared} if agree else {f"start of {r}": s for r, s in by_recipe.items()}
        blocks = []
        for name, starts in named.items():
            rows: list[tuple[str, Levels | None, str]] = [
                (str(seed), starts[seed], "") for seed in sorted(starts)
            ]
            # Greedy validation of one checkpoint does not depend on the seed: say it once.
            if len({tuple(_values(levels, columns)) for levels in starts.values()}) == 1:
                rows = [("all" if len(rows) > 1 else rows[0][0], rows[0][1], "")]
            if rows:
                blocks.append(_Block(name, rows))
        return blocks

    def _blocks(self) -> list[_Block]:
        ends = [
            _Block(recipe, [(str(one.seed), one.end, one.status) for one in outcomes])
            for recipe, outcomes in self._recipes().items()
        ]
        return [*self._starts(), *ends]

    def _rows(self) -> list[list[_Row]]:
        columns = self._columns()
        sections = []
        for block in self._blocks():
            rows = []
            for seed, levels, status in block.rows:
                cells = [(text, "") for text in _values(levels, columns)]
                said = seed if levels or status in ("", "done") else f"{seed}: {status}"
                rows.append(_Row(block.name, said, cells))
            known = [levels for _, levels, _ in block.rows if levels]
            if len(block.rows) > 1 and known:
                of = "" if len(known) == len(block.rows) else f" of {len(known)}"
                cells = [_mean_text(known, level, key) for level, key in columns]
                rows.append(_Row(block.name, f"mean{of}", cells, is_mean=True))
            sections.append(rows)
        return sections

    def notes(self) -> list[str]:
        """How to read the table."""
        deviation = (
            "One row per seed; mean ± sample standard deviation over seeds. Accuracy (acc) and "
            "consistency (cons) are shares of the validation prompts by level, after the last step."
        )
        return list(dict.fromkeys([deviation, *(n for one in self.outcomes for n in one.notes)]))

    def table(self) -> Table:
        """The table for a terminal of 80 columns."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("run", overflow="fold")
        table.add_column("seed", overflow="fold")
        for level, key in self._columns():
            heading = plain(f"{one_line(level)}\n{_SHORT[key]}")
            table.add_column(heading, justify="right", no_wrap=True)
        for rows in self._rows():
            for place, row in enumerate(rows):
                # The deviation on a line of its own keeps the columns narrow.
                cells = [f"{text}\n±{spread}" if spread else text for text, spread in row.values]
                style = "bold" if row.is_mean else None
                name = plain(row.name) if place == 0 else ""
                table.add_row(name, plain(row.seed), *cells, style=style)
            table.add_section()
        return table

    def markdown(self) -> str:
        """The same table in Markdown, with its notes."""
        columns = self._columns()
        heading = ["run", "seed", *(f"{level} {COLUMNS[key]}" for level, key in columns)]
        lines = [
            "# Comparison",
            "",
            markdown_row(heading),
            markdown_row(["---"] * 2 + ["---:"] * len(columns)),
        ]
        for row in (row for rows in self._rows() for row in rows):
            cells = [f"{text} ± {spread}" if spread else text for text, spread in row.values]
            cells = [row.name, row.seed, *cells]
            lines.append(markdown_row([f"**{cell}**" for cell in cells] if row.is_mean else cells))
        if self.overrides:
            changed = ", ".join(f"`{override}`" for override in self.overrides)
            lines += ["", f"Overrides of the recipes: {changed}."]
        for note in self.notes():
            lines += ["", note]
        return "\n".join(lines) + "\n"

    def as_json(self) -> dict[str, Any]:
        """All results of every run, and mean, deviation and count by recipe, level and key."""
        runs = [
            {
                "recipe": one.recipe,
                "seed": one.seed,
                "folder": one.folder,
                "status": one.status,
                "steps": one.steps,
                "wall_seconds": one.wall_seconds,
                "start": one.start,
                "end": one.end,
            }
            for one in self.outcomes
        ]
        summary = {
            recipe: {
                side: summary_by_level([getattr(one, side) for one in outcomes])
                for side in ("start", "end")
            }
            for recipe, outcomes in self._recipes().items()
        }
        return {
            "overrides": list(self.overrides),
            "runs": runs,
            "summary": summary,
            "notes": self.notes(),
        }


def _values(levels: Levels | None, columns: Sequence[tuple[str, str]]) -> list[str]:
    return [rate((levels or {}).get(level, {}).get(key)) for level, key in columns]


def _mean_text(results: Sequence[Levels | None], level: str, key: str) -> tuple[str, str]:
    known = known_numbers(results, level, key)
    mean, spread = mean_and_spread(known)
    return rate(mean), rate(spread) if len(known) > 1 else ""
