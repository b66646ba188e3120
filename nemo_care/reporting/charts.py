"""The most important curves, drawn in the page with their values on hover.

They are SVG without a program: the browser shows the values of the step under the mouse, and
colours follow the page, light, dark or printed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from nemo_care.reporting.curves import by_step, time_layers, usual
from nemo_care.reporting.figures import COLOURS, OTHER
from nemo_care.runs import metrics as m
from nemo_care.runs.reader import RunRecord

if TYPE_CHECKING:
    from pandas import DataFrame

# Pixels of a telephone's screen, on which the text must be readable.
WIDTH, HEIGHT = 400, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 24
_MOST_POINTS = 400  # more steps are averaged
_SHOWN = (
    ("Accuracy", m.ACCURACY, True),
    ("Consistency", m.CONSISTENCY, True),
    ("Answer likelihood", m.ANSWER_LIKELIHOOD, True),
    ("Groups in which the bonus selects", m.SELECTION_RATE, True),
    ("Completion length, tokens", m.COMPLETION_TOKENS, False),
)


@dataclass(frozen=True)
class Line:
    """A curve, or a layer of a stack."""

    label: str
    colour: str
    path: str
    filled: bool


@dataclass(frozen=True)
class Chart:
    """One chart in a box of `WIDTH` x `HEIGHT`."""

    title: str
    last: str
    """The newest value."""
    lines: list[Line]
    rows: list[tuple[float, str]]
    """Place and text of the lines of the grid."""
    ends: list[tuple[float, str]]
    """Place and text of the first and the last step."""
    columns: list[tuple[float, float, str]]
    """Left edge, width and values of each step."""


def draw_charts(run: RunRecord) -> list[Chart]:
    """Draw accuracy, consistency, likelihood, selection, length and time per step, where known."""
    values = by_step(run, [metric for _, metric, _ in _SHOWN])
    charts = [
        _chart(title, values[[metric]], 1.0 if is_share else values[metric].max())
        for title, metric, is_share in _SHOWN
        if metric in values
    ]
    layers = time_layers(run)
    if not layers.empty:
        top = usual(layers.sum(axis="columns"))
        charts.append(_chart("Time of a step, seconds", layers, top, stacked=True))
    return charts


def _chart(title: str, lines: DataFrame, top: float, *, stacked: bool = False) -> Chart:
    """Draw each column by step, or all of them one above the other."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    bucket = np.arange(len(lines)) // math.ceil(len(lines) / _MOST_POINTS)
    means = lines.groupby(bucket).mean()
    spans = lines.index.to_series().groupby(bucket).agg(["first", "last"])
    first, last = lines.index[0], lines.index[-1]
    across = (WIDTH - _LEFT - _RIGHT) / max(1, last - first)
    xs = (_LEFT + (spans.mean(axis="columns") - first) * across).tolist()
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(0, top or 1.0)
    top = max(top, ticks[-1])

    def y(value: float) -> float:
        return round(_TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - min(value, top * 1.05) / top), 1)

    tops = means.cumsum(axis="columns")
    bases = tops.shift(axis="columns", fill_value=0.0)
    drawn = []
    for place, name in enumerate(means):
        colour = OTHER if name == "other" else COLOURS[place % len(COLOURS)]
        if stacked:
            edge = [*zip(xs, tops[name], strict=True)]
            edge += reversed([*zip(xs, bases[name], strict=True)])
            path = "M" + "L".join(f"{x:.1f} {y(value)}" for x, value in edge) + "Z"
        else:
            path = _path([(x, y(v)) if math.isfinite(v) else None
                          for x, v in zip(xs, means[name], strict=True)])  # fmt: skip
        drawn.append(Line(str(name), colour, path, stacked))
    edges = [_LEFT, *((a + b) / 2 for a, b in pairwise(xs)), WIDTH - _RIGHT]
    columns = []
    for at, (begin, end) in enumerate(spans.itertuples(index=False)):
        where = f"step {begin}" if begin == end else f"steps {begin} to {end}, mean"
        parts = [
            f"{name} {_digits(value)}" if stacked else _digits(value)
            for name, value in means.iloc[at].items()
        ]
        width = round(edges[at + 1] - edges[at], 1)
        columns.append((round(edges[at], 1), width, f"{where}: {', '.join(parts)}"))
    return Chart(
        title,
        _digits(lines.iloc[-1].sum(skipna=False)),
        drawn,
        [(y(tick), f"{tick:g}") for tick in ticks],
        [(xs[0], f"step {first}"), (xs[-1], str(last))][: 1 + (last > first)],
        columns,
    )


def _path(points: Sequence[tuple[float, float] | None]) -> str:
    """Through the points, broken where one is missing; a point alone is drawn as a dot."""
    parts, draws = [], False
    for at, point in enumerate(points):
        if point is None:
            draws = False
            continue
        parts.append(f"{'L' if draws else 'M'}{point[0]:.1f} {point[1]}")
        is_alone = not draws and (at + 1 == len(points) or points[at + 1] is None)
        if is_alone:
            parts.append("h.1")
        draws = True
    return "".join(parts)


def _digits(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"
