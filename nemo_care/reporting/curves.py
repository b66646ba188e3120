"""The curves of a run, drawn as PNG files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_care.reporting.figures import (
    AXES,
    COLOURS,
    LEFT,
    OTHER,
    RIGHT,
    Curve,
    finish,
    new_sheet,
    save,
)
from nemo_care.reporting.tables import level_names
from nemo_care.runs import metrics as m
from nemo_care.runs.metric import Metric, Panel, Sheet
from nemo_care.runs.reader import RunRecord, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = ("o", "s", "^", "D")
# Fewer steps are drawn with a mark each, so that a single step shows too; many more are drawn
# faintly under their running mean.
_MARKED_STEPS = 30
SMOOTHED_STEPS = 60

_VALIDATION = {
    "accuracy": "Accuracy",
    "consistency_rate": "Consistency",
    "probe_implied": "Probe: implied letter",
}


def _known(values: Sequence[float]) -> bool:
    return any(not math.isnan(value) for value in values)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of the known values within width // 2 steps on either side."""
    reach = width // 2
    means = []
    for place in range(len(values)):
        window = values[max(0, place - reach) : place + reach + 1]
        known = [value for value in window if not math.isnan(value)]
        means.append(math.fsum(known) / len(known) if known else math.nan)
    return means


def _line(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    label: str,
    colour: str,
    *,
    smooth: bool = True,
) -> None:
    if smooth and len(steps) > SMOOTHED_STEPS:
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        values = _running_mean(values, max(5, len(steps) // 20))
    mark = "o" if len(steps) <= _MARKED_STEPS else None
    axes.plot(steps, values, color=colour, linewidth=1.6, marker=mark, markersize=3.5, label=label)


def _has_something(run: RunRecord, panel: Panel, lines: Iterable[Metric]) -> bool:
    values = [value for metric in lines for value in run.series(metric)]
    if panel.needs_more_than_zero:
        return any(value > 0 for value in values)
    return _known(values)


def _metric_sheet(run: RunRecord, sheet: Sheet, folder: Path) -> Curve | None:
    recorded = dict.fromkeys(key for record in run.metrics for key in record)
    panels = {
        panel: lines
        for panel, lines in m.panels_of(sheet, recorded).items()
        if _has_something(run, panel, lines)
    }
    if run.setting("algorithm.kl_coefficient") == 0:
        # Not computed then: a line at 0 would say that the policy has not moved.
        panels = {panel: lines for panel, lines in panels.items() if m.KL not in lines}
    if not panels:
        return None
    figure, places = new_sheet(len(panels))
    for axes, (panel, lines) in zip(places, panels.items(), strict=True):
        drawn = 0
        for colour, metric in zip(cycle(COLOURS), lines, strict=False):
            values = run.series(metric)
            if _known(values):
                _line(axes, run.steps(), values, metric.label, colour, smooth=panel.smooth)
                drawn += 1
        finish(
            axes,
            panel.title,
            panel.unit,
            share=panel.share,
            from_zero=panel.from_zero,
            keys=drawn,
        )
    return save(figure, folder, sheet.name, sheet.title)


def _time_sheet(run: RunRecord, folder: Path) -> Curve | None:
    named = {phase.short: run.series(phase) for phase in m.PHASES}
    # A stack needs a number everywhere; a phase that a step did not time counts as 0.
    layers = {
        phase: [0.0 if math.isnan(value) else value for value in values]
        for phase, values in named.items()
        if _known(values)
    }
    whole = run.series(m.STEP_TIME)
    if _known(whole):
        timed = [math.fsum(step) for step in zip(*layers.values(), strict=True)]
        timed = timed or [0.0] * len(whole)
        layers["other"] = [
            0.0 if math.isnan(a) else max(0.0, a - b) for a, b in zip(whole, timed, strict=True)
        ]
    if not layers:
        return None
    figure, (axes,) = new_sheet(1, axes_width=2 * AXES[0] + LEFT + RIGHT)
    base = [0.0] * len(run.metrics)
    for place, (phase, values) in enumerate(layers.items()):
        colour = OTHER if phase == "other" else COLOURS[place]
        top = [a + b for a, b in zip(base, values, strict=True)]
        if len(values) <= _MARKED_STEPS:
            axes.bar(run.steps(), values, bottom=base, width=0.8, color=colour, label=phase)
        else:
            axes.fill_between(
                run.steps(), base, top, color=colour, label=phase, linewidth=0, step="mid"
            )
        base = top
    # One slow step (the first, a checkpoint) must not flatten all others.
    ordered = sorted(base)
    usual = ordered[int(0.95 * (len(ordered) - 1))]
    cut = len(base) > _MARKED_STEPS and ordered[-1] > 3 * usual > 0
    title = "Time per step" + (f" (longest: {ordered[-1]:.3g} s)" if cut else "")
    finish(axes, title, "seconds", share=False, from_zero=True, keys=len(layers))
    if cut:
        axes.set_ylim(0, 1.6 * usual)
    return save(figure, folder, "time", "Time")


def _validation_sheet(run: RunRecord, folder: Path) -> Curve | None:
    if len(run.validations) < 2:
        return None
    steps = [record["step"] for record in run.validations]
    levels = level_names(*(record["levels"] for record in run.validations))
    panels = {
        key: {
            level: [number(record["levels"].get(level, {}).get(key)) for record in run.validations]
            for level in levels
        }
        for key in _VALIDATION
    }
    shown = {key: lines for key, lines in panels.items() if any(map(_known, lines.values()))}
    if not shown:
        return None
    figure, places = new_sheet(len(shown))
    for axes, (key, lines) in zip(places, shown.items(), strict=True):
        for place, (level, values) in enumerate(lines.items()):
            axes.plot(
                steps,
                values,
                color=COLOURS[place % len(COLOURS)],
                linewidth=1.6,
                marker=_MARKS[place % len(_MARKS)],
                markersize=4,
                label=level,
            )
        unit = "probability" if key.startswith("probe") else "share"
        finish(axes, _VALIDATION[key], unit, share=True, from_zero=True, keys=len(lines))
    return save(figure, folder, "validation", "Validation")


def draw_curves(run: RunRecord, folder: Path) -> list[Curve]:
    """Draw all curves that the run has values for into `folder`, which is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    curves = [_metric_sheet(run, sheet, folder) for sheet in m.SHEETS[:2]]
    curves.append(_validation_sheet(run, folder))
    curves.extend(_metric_sheet(run, sheet, folder) for sheet in m.SHEETS[2:])
    curves.append(_time_sheet(run, folder))
    return [curve for curve in curves if curve is not None]
