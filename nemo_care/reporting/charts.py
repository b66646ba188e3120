"""The few curves by which one sees how a run goes: drawn in the page, with their values on hover.

They are SVG without a program: the browser shows the values of a step where the mouse is over it,
and colours follow the page, light, dark or printed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nemo_care.reporting.figures import COLOURS, OTHER
from nemo_care.runs import metrics as m
from nemo_care.runs.reader import RunRecord

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
    """Accuracy, consistency, likelihood, selection, length, and the time of a step, where known."""
    charts = []
    for title, metric, share in _SHOWN:
        values = run.series(metric)
        if any(map(math.isfinite, values)):
            top = 1.0 if share else max(value for value in values if math.isfinite(value))
            charts.append(_chart(title, run.steps(), {metric.label: values}, top))
    phases = {metric.short: run.series(metric) for metric in m.PHASES}
    whole = run.series(m.STEP_TIME)
    phases = {name: values for name, values in phases.items() if any(map(math.isfinite, values))}
    if phases and any(map(math.isfinite, whole)):
        parts = [[value if math.isfinite(value) else 0.0 for value in v] for v in phases.values()]
        used = [sum(part) for part in zip(*parts, strict=True)]
        rest = [max(0.0, all_of - some) if math.isfinite(all_of) else 0.0
                for all_of, some in zip(whole, used, strict=True)]  # fmt: skip
        layers = dict(zip(phases, parts, strict=True)) | {"other": rest}
        totals = [sum(part) for part in zip(*layers.values(), strict=True)]
        # One slow step (the first, a checkpoint) must not flatten all others.
        usual = sorted(totals)[int(0.95 * (len(totals) - 1))]
        charts.append(_chart("Time of a step, seconds", run.steps(), layers, usual, stacked=True))
    return charts


def _chart(
    title: str,
    steps: Sequence[int],
    lines: dict[str, Sequence[float]],
    top: float,
    *,
    stacked: bool = False,
) -> Chart:
    size = math.ceil(len(steps) / _MOST_POINTS)
    buckets = [range(at, min(at + size, len(steps))) for at in range(0, len(steps), size)]
    means = {
        name: [_mean([values[i] for i in bucket]) for bucket in buckets]
        for name, values in lines.items()
    }
    ticks = _ticks(top)
    top = max(top, ticks[-1])
    first, last = steps[0], steps[-1]
    across = (WIDTH - _LEFT - _RIGHT) / max(1, last - first)
    xs = [_LEFT + (steps[b[0]] + steps[b[-1]] - 2 * first) / 2 * across for b in buckets]

    def y(value: float) -> float:
        return round(_TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - min(value, top * 1.05) / top), 1)

    drawn, base = [], [0.0] * len(buckets)
    for place, (name, values) in enumerate(means.items()):
        colour = OTHER if name == "other" else COLOURS[place % len(COLOURS)]
        if stacked:
            tops = [under + value for under, value in zip(base, values, strict=True)]
            edge = [*zip(xs, tops, strict=True), *reversed(list(zip(xs, base, strict=True)))]
            path = "M" + "L".join(f"{x:.1f} {y(value)}" for x, value in edge) + "Z"
            base = tops
        else:
            path = _path([(x, y(v)) if math.isfinite(v) else None
                          for x, v in zip(xs, values, strict=True)])  # fmt: skip
        drawn.append(Line(name, colour, path, stacked))
    edges = [_LEFT, *((a + b) / 2 for a, b in pairwise(xs)), WIDTH - _RIGHT]
    columns = []
    for at, bucket in enumerate(buckets):
        many = f"steps {steps[bucket[0]]} to {steps[bucket[-1]]}, mean"
        where = f"step {steps[bucket[0]]}" if len(bucket) == 1 else many
        parts = [f"{name} {_digits(values[at])}" for name, values in means.items()]
        text = f"{where}: " + (
            ", ".join(parts) if stacked else _digits(means[next(iter(means))][at])
        )
        columns.append((round(edges[at], 1), round(edges[at + 1] - edges[at], 1), text))
    newest = [values[-1] for values in lines.values()]
    return Chart(
        title,
        _digits(sum(newest)),
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


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _ticks(top: float) -> list[float]:
    """0 and at most four round numbers above it."""
    if top <= 0:
        return [0.0, 1.0]
    widths = (factor * 10.0**power for power in range(-9, 12) for factor in (1, 2, 2.5, 5))
    width = next(width for width in widths if top / width <= 4)
    return [width * number for number in range(math.ceil(top / width) + 1)]


def _digits(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"
