"""The figures of a study: a dot for each run, and curves over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_care.experiments.findings import ACCURACY, CONSISTENCY, PROBE, Findings, Place
from nemo_care.experiments.results import CURVES
from nemo_care.reporting.figures import COLOURS, OTHER, Curve, finish, new_sheet, save
from nemo_care.runs import metrics as m

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

DOTS = "Each run after training: dots are seeds, bars their mean; dashed: before training"
OVER_STEPS = "Over the training steps: mean over seeds, and from the lowest to the highest seed"
# Inches: a panel of dots, the gap between two, a row, a letter of a variant's title.
_PANEL, _GAP, _ROW, _LETTER = 1.9, 0.2, 0.27, 0.06
_ABOVE, _BELOW, _MARGIN = 0.4, 0.35, 0.3
_TITLES = {
    CONSISTENCY: "Consistency",
    ACCURACY: "Accuracy",
    PROBE: "Probe implied",
}
_PANELS = {
    m.CONSISTENCY: ("Sampled completions: consistency", "share"),
    m.ACCURACY: ("Sampled completions: accuracy", "share"),
    m.ANSWER_LIKELIHOOD: ("Answer likelihood under the reference", "probability"),
}


def draw_dots(findings: Findings, folder: Path, name: str) -> Curve | None:
    """Draw consistency, accuracy and the probe of each run, one row per variant."""
    from matplotlib.figure import Figure

    first, last = findings.levels[:1], findings.levels[-1:]
    panels = [
        *findings.places(CONSISTENCY, first),
        *findings.places(ACCURACY, [*first, *last]),
        *findings.places(PROBE, first),
    ]
    rows = [row for row in (*findings.starts, *findings.study.variants) if len(findings.ends(row))]
    if not panels:
        return None
    titles = [findings.title_of(row) for row in rows]
    left = _LETTER * max(map(len, titles)) + _MARGIN
    across = len(panels) * (_PANEL + _GAP)
    width, height = left + across, _ABOVE + _ROW * len(rows) + _BELOW
    figure = Figure(figsize=(width, height), dpi=130)
    for place, panel in enumerate(panels):
        x = left + place * (_PANEL + _GAP)
        box = (x / width, _BELOW / height, _PANEL / width, _ROW * len(rows) / height)
        _dots(figure.add_axes(box), findings, rows, panel, titles if place == 0 else None)
    return save(figure, folder, name, DOTS)


def _dots(
    axes: Axes,
    findings: Findings,
    rows: Sequence[str],
    panel: Place,
    titles: Sequence[str] | None,
) -> None:
    level, key = panel
    for height, row in enumerate(rows):
        values = findings.ends(row)[panel].dropna()
        if values.empty:
            continue
        mean = values.mean()
        colour = OTHER if row in findings.starts else COLOURS[0]
        axes.scatter(values, [height] * len(values), s=22, color=colour, alpha=0.6, linewidths=0)
        axes.vlines(mean, height - 0.32, height + 0.32, color=colour, linewidth=2)
        if [row] == list(findings.starts):
            axes.axvline(mean, color=OTHER, linewidth=0.9, linestyle="--", zorder=0)
    axes.set_title(f"{_TITLES[key]} ({level})", fontsize=9, loc="left", fontweight="bold")
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "0.5", "", "1"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), titles or [""] * len(rows))
    axes.tick_params(labelsize=8, length=0)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_curves(findings: Findings, folder: Path, name: str) -> Curve | None:
    """Draw the study's chosen variants over the steps."""
    variants = [variant for variant in findings.study.curves if findings.of(variant)]
    colours = dict(zip(variants, cycle(COLOURS), strict=False))
    lines = {
        key: {
            variant: found
            for variant in variants
            if (found := _band(findings, variant, key)) is not None
        }
        for key in CURVES
    }
    shown = {key: bands for key, bands in lines.items() if bands}
    if not shown:
        return None
    figure, places = new_sheet(len(shown))
    named = {}
    for axes, (key, bands) in zip(places, shown.items(), strict=True):
        for variant, band in bands.items():
            colour = colours[variant]
            axes.fill_between(
                band.index, band["min"], band["max"], color=colour, alpha=0.18, linewidth=0
            )
            (named[variant],) = axes.plot(band["mean"], color=colour, linewidth=1.6)
        # One legend for all panels: variants' titles are too long for a legend in each.
        finish(axes, *_PANELS[key], share=True, from_zero=True, keys=0)
    figure.legend(
        [named[variant] for variant in variants if variant in named],
        [findings.title_of(variant) for variant in variants if variant in named],
        loc="lower center",
        ncols=len(named),
        fontsize=9,
        frameon=False,
    )
    return save(figure, folder, name, OVER_STEPS)


def _band(findings: Findings, variant: str, key: str) -> DataFrame | None:
    """Return lowest, mean and highest value over seeds by step; None if no run has the curve."""
    import pandas as pd

    curves = [
        pd.Series(run.curves[key], index=run.curves["step"], dtype=float)
        for run in findings.of(variant).values()
        if key in run.curves
    ]
    known = pd.concat(curves).dropna() if curves else pd.Series(dtype=float)
    return known.groupby(level=0).agg(["min", "mean", "max"]) if len(known) else None
