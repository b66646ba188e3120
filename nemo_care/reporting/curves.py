"""The curves of a run, drawn as PNG files."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from nemo_care.reporting.panels import SHEETS, Panel, Sheet
from nemo_care.reporting.tables import level_names
from nemo_care.runs.reader import RunRecord, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKS = ("o", "s", "^", "D")
# Fewer steps are drawn with a mark each, so that a single step shows too; many more are drawn
# faintly under their running mean.
_MARKED_STEPS = 30
SMOOTHED_STEPS = 60


_PHASES = ("rollout", "reward", "scoring", "update")
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


def _panels(run: RunRecord, sheet: Sheet) -> list[Panel]:
    """The sheet's panels; the user's own rewards, which only the run names, go with the rewards."""
    if sheet.name != "reward":
        return sheet.panels
    named = {key for panel in sheet.panels for key in panel.lines}
    own = {
        key: key.removeprefix("reward/")
        for record in run.metrics
        for key in record
        if key.startswith("reward/") and key not in named
    }
    return [*sheet.panels, Panel("Own rewards", own, "mean reward")]


def _has_something(run: RunRecord, panel: Panel) -> bool:
    values = [value for key in panel.lines for value in run.series(key)]
    if panel.needs_more_than_zero:
        return any(value > 0 for value in values)
    return _known(values)


def _metric_sheet(run: RunRecord, sheet: Sheet, folder: Path) -> Curve | None:
    panels = [p for p in _panels(run, sheet) if _has_something(run, p)]
    if run.setting("algorithm.kl_coefficient") == 0:
        # Not computed then: a line at 0 would say that the policy has not moved.
        panels = [p for p in panels if "train/kl" not in p.lines]
    if not panels:
        return None
    figure, places = new_sheet(len(panels))
    for axes, panel in zip(places, panels, strict=True):
        drawn = 0
        for colour, (key, label) in zip(cycle(COLOURS), panel.lines.items(), strict=False):
            values = run.series(key)
            if _known(values):
                _line(axes, run.steps(), values, label, colour, smooth=panel.smooth)
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
    named = {phase: run.series(f"timing/{phase}") for phase in _PHASES}
    # A stack needs a number everywhere; a phase that a step did not time counts as 0.
    layers = {
        phase: [0.0 if math.isnan(value) else value for value in values]
        for phase, values in named.items()
        if _known(values)
    }
    whole = run.series("timing/step")
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
    curves = [_metric_sheet(run, sheet, folder) for sheet in SHEETS[:2]]
    curves.append(_validation_sheet(run, folder))
    curves.extend(_metric_sheet(run, sheet, folder) for sheet in SHEETS[2:])
    curves.append(_time_sheet(run, folder))
    return [curve for curve in curves if curve is not None]
