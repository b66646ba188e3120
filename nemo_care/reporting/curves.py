"""The curves of a run, drawn as PNG files."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_care.reporting.figures import (
    AXES,
    COLOURS,
    LEFT,
    RIGHT,
    Curve,
    finish,
    new_sheet,
    save,
    stack,
)
from nemo_care.reporting.tables import numbers
from nemo_care.runs import metrics as m
from nemo_care.runs.metric import Sheet
from nemo_care.runs.reader import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame, Series

_MARKS = ("o", "s", "^", "D")
# Fewer steps are drawn with markers, so that a single step is visible; more are drawn faintly under
# their running mean.
_MARKED_STEPS = 30
SMOOTHED_STEPS = 60

_VALIDATION = {
    "accuracy": "Accuracy",
    "consistency_rate": "Consistency",
    "probe_implied": "Probe: implied letter",
}


def by_step(run: RunRecord, keys: Iterable[str]) -> DataFrame:
    """Return metrics by step, with a column for each that has a value in the run."""
    import pandas as pd

    series = {key: run.series(key) for key in keys}
    return pd.DataFrame(series, run.steps(), dtype=float).dropna(axis="columns", how="all")


def time_layers(run: RunRecord) -> DataFrame:
    """Return the seconds of each phase by step, and in "other" the rest of the step."""
    frame = by_step(run, [*m.PHASES, m.STEP_TIME])
    # A stack needs numbers everywhere; a phase that a step did not time counts as 0.
    layers = frame[[phase for phase in m.PHASES if phase in frame]].fillna(0)
    if m.STEP_TIME in frame:
        rest = frame[m.STEP_TIME] - layers.sum(axis="columns")
        layers["other"] = rest.clip(lower=0).fillna(0)
    return layers.rename(columns={phase: phase.short for phase in m.PHASES})


def usual(heights: Series) -> float:
    """Return the usual height of a stack: one slow step (the first, a save) must not flatten it."""
    return heights.quantile(0.95, interpolation="lower")


def _line(axes: Axes, values: Series, label: str, colour: str, *, smooth: bool) -> None:
    count = len(values)
    if smooth and count > SMOOTHED_STEPS:
        axes.plot(values, color=colour, alpha=0.25, linewidth=0.8)
        reach = max(5, count // 20) // 2
        values = values.rolling(2 * reach + 1, center=True, min_periods=1).mean()
    mark = "o" if count <= _MARKED_STEPS else None
    axes.plot(values, color=colour, linewidth=1.6, marker=mark, markersize=3.5, label=label)


def _metric_sheet(run: RunRecord, sheet: Sheet, folder: Path) -> Curve | None:
    recorded = dict.fromkeys(key for record in run.metrics for key in record)
    panels = []
    for panel, lines in m.panels_of(sheet, recorded).items():
        frame = by_step(run, lines)
        shown = (frame > 0).any(axis=None) if panel.needs_more_than_zero else not frame.empty
        # Without a coefficient the KL is not computed: a line at 0 would suggest that the policy
        # has not moved.
        if shown and not (m.KL in frame and run.setting("algorithm.kl_coefficient") == 0):
            panels.append((panel, lines, frame))
    if not panels:
        return None
    figure, places = new_sheet(len(panels))
    for axes, (panel, lines, frame) in zip(places, panels, strict=True):
        for colour, metric in zip(cycle(COLOURS), lines, strict=False):
            if metric in frame:
                _line(axes, frame[metric], metric.label, colour, smooth=panel.smooth)
        finish(
            axes,
            panel.title,
            panel.unit,
            share=panel.share,
            from_zero=panel.from_zero,
            keys=len(frame.columns),
        )
    return save(figure, folder, sheet.name, sheet.title)


def _time_sheet(run: RunRecord, folder: Path) -> Curve | None:
    layers = time_layers(run)
    if layers.empty:
        return None
    figure, (axes,) = new_sheet(1, axes_width=2 * AXES[0] + LEFT + RIGHT)
    many = len(layers) > _MARKED_STEPS
    stack(axes, layers, width=None if many else 0.8)
    heights = layers.sum(axis="columns")
    longest, top = heights.max(), usual(heights)
    cut = many and longest > 3 * top > 0
    title = "Time per step" + (f" (longest: {longest:.3g} s)" if cut else "")
    finish(axes, title, "seconds", share=False, from_zero=True, keys=len(layers.columns))
    if cut:
        axes.set_ylim(0, 1.6 * top)
    return save(figure, folder, "time", "Time")


def _validation_sheet(run: RunRecord, folder: Path) -> Curve | None:
    if len(run.validations) < 2:
        return None
    frame = numbers({one["step"]: one["levels"] for one in run.validations}, keys=_VALIDATION)
    panels = {key: frame.xs(key, axis="columns", level=1) for key in _VALIDATION}
    shown = {key: lines for key, lines in panels.items() if lines.notna().any(axis=None)}
    if not shown:
        return None
    figure, places = new_sheet(len(shown))
    for axes, (key, lines) in zip(places, shown.items(), strict=True):
        for place, level in enumerate(lines):
            axes.plot(
                lines[level],
                color=COLOURS[place % len(COLOURS)],
                linewidth=1.6,
                marker=_MARKS[place % len(_MARKS)],
                markersize=4,
                label=level,
            )
        unit = "probability" if key.startswith("probe") else "share"
        finish(axes, _VALIDATION[key], unit, share=True, from_zero=True, keys=len(lines.columns))
    return save(figure, folder, "validation", "Validation")


def draw_curves(run: RunRecord, folder: Path) -> list[Curve]:
    """Draw all curves that have values into `folder`, which is created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = [_metric_sheet(run, sheet, folder) for sheet in m.SHEETS[:2]]
    curves.append(_validation_sheet(run, folder))
    curves.extend(_metric_sheet(run, sheet, folder) for sheet in m.SHEETS[2:])
    curves.append(_time_sheet(run, folder))
    return [curve for curve in curves if curve is not None]
