"""Compare the speed of several runs of one recipe by their number of GPUs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_care.errors import InputError
from nemo_care.reporting.figures import COLOURS, Curve, finish, new_sheet, save, stack
from nemo_care.reporting.page import write_page
from nemo_care.runs import metrics as m
from nemo_care.runs.reader import RunRecord, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

_MEASURED = (m.STEP_TIME, *m.PHASES, m.PROMPT_TOKENS, m.COMPLETION_TOKENS)
_PHASES = [*(f"{phase.short} (s)" for phase in m.PHASES), "other (s)"]
_FORMATS = {
    "run": "{}",
    "nodes": "{}",
    "GPUs": "{}",
    "steps": "{}",
    "tokens/s": "{:,.0f}",
    "tokens/s per GPU": "{:,.1f}",
    "efficiency": "{:.0%}",
    "step (s)": "{:.2f}",
    **dict.fromkeys(_PHASES, "{:.2f}"),
}
_EXPLANATION = (
    "Tokens include prompts (each counted once for its group) and completions. Times are "
    "medians over the steps after the first, which includes warm-up. Efficiency is the "
    "tokens per second and GPU relative to the run with the fewest GPUs."
)


def _size_of(run: RunRecord) -> dict[str, Any]:
    """Return a run's size, and the tokens and seconds of its median step.

    Raises:
        InputError: the run has too few steps, no recipe, or metrics that lack lengths or times.
    """
    import pandas as pd

    settings = [
        run.setting(key)
        for key in (
            "trainer.devices",
            "trainer.num_nodes",
            "algorithm.prompts_per_step",
            "algorithm.group_size",
        )
    ]
    if not all(isinstance(value, int) for value in settings):
        raise InputError(f"{run.folder}: its recipe.yaml is missing or incomplete; run it again")
    devices, nodes, prompts, group = settings
    if len(run.metrics) < 2:
        raise InputError(
            f"{run.folder}: {len(run.metrics)} steps so far; a comparison needs at least 2, of "
            "which the first does not count"
        )
    metrics = pd.DataFrame({key: run.series(key)[1:] for key in _MEASURED}, dtype=float)
    usual = metrics.median()
    for key in usual.index[usual.isna()]:
        raise InputError(f"{run.folder}: metrics.jsonl has no {key}; run it again")
    phases = {f"{phase.short} (s)": usual[phase] for phase in m.PHASES}
    return {
        "run": run.folder.name,
        "nodes": nodes,
        "GPUs": devices * nodes,
        "steps": len(run.metrics),
        "tokens": prompts * (usual[m.PROMPT_TOKENS] + group * usual[m.COMPLETION_TOKENS]),
        "step (s)": usual[m.STEP_TIME],
        **phases,
        "other (s)": max(0.0, usual[m.STEP_TIME] - math.fsum(phases.values())),
    }


def sizes_of(runs: Sequence[RunRecord]) -> DataFrame:
    """Return the runs by size, the smallest first, with their speed.

    Times and tokens are those of a step. Efficiency is relative to the first.

    Raises:
        InputError: a run can't be measured.
    """
    import pandas as pd

    sizes = pd.DataFrame([_size_of(run) for run in runs])
    sizes = sizes.sort_values("GPUs", kind="stable", ignore_index=True)
    sizes["tokens/s"] = sizes["tokens"] / sizes["step (s)"]
    per_gpu = sizes["tokens/s"] / sizes["GPUs"]
    sizes["tokens/s per GPU"], sizes["efficiency"] = per_gpu, per_gpu / per_gpu[0]
    return sizes


def scaling_lines(sizes: DataFrame) -> list[list[str]]:
    """Return the heading and the rows of the table."""
    columns = [sizes[name].map(form.format) for name, form in _FORMATS.items()]
    return [list(_FORMATS), *map(list, zip(*columns, strict=True))]


def _draw(sizes: DataFrame, folder: Path) -> Curve:
    figure, (speed, share, time) = new_sheet(3)
    _line(speed, sizes, "tokens/s per GPU")
    by_gpus = partial(finish, share=False, from_zero=True, x="GPUs")
    by_gpus(speed, "Speed", "tokens/s per GPU", keys=1)
    _line(share, sizes, "efficiency")
    by_gpus(share, "Efficiency", "share of the smallest", keys=1)
    stack(time, sizes[_PHASES].rename(columns=lambda name: name.removesuffix(" (s)")), width=0.6)
    by_gpus(time, "Time of a step", "seconds", keys=5)
    time.set_xticks(sizes.index, sizes["GPUs"].map(str))
    for axes in (speed, share):
        axes.set_xlim(0, 1.1 * sizes["GPUs"].max())
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
    return save(figure, folder, "scaling", "Speed, efficiency and phases by number of GPUs")


def _line(axes: Axes, sizes: DataFrame, name: str) -> None:
    axes.plot(sizes["GPUs"], sizes[name], color=COLOURS[0], linewidth=1.6, marker="o", markersize=4)


def write_scaling_report(runs: Sequence[str | Path], folder: Path) -> tuple[Path, list[list[str]]]:
    """Draw `FOLDER/scaling.png` and write `FOLDER/scaling.html`, which includes it.

    Returns the page's path and the lines of the table, the smallest run first.

    Raises:
        InputError: a directory is not a run's, or a run can't be measured.
    """
    sizes = sizes_of([read_run(run) for run in runs])
    folder.mkdir(parents=True, exist_ok=True)
    lines = scaling_lines(sizes)
    target = folder / "scaling.html"
    write_page(
        target,
        "scaling.html",
        title="Scaling",
        kind="nemo-care",
        state="",
        table=lines,
        explanation=_EXPLANATION,
        curve=_draw(sizes, folder),
    )
    return target, lines
