"""How a run's speed follows the number of GPUs: several runs of one recipe, side by side."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_care.errors import InputError
from nemo_care.process.os_errors import naming
from nemo_care.reporting import page
from nemo_care.reporting.figures import COLOURS, OTHER, Curve, finish, new_sheet, save
from nemo_care.runs import metrics as m
from nemo_care.runs.reader import RunRecord, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EXPLANATION = (
    "Tokens are those of prompts (each counted once for its group) and completions. Times are "
    "medians over the steps after the first, which warms up kernels and caches. Efficiency is the "
    "tokens per second and GPU relative to the run with the fewest GPUs."
)


@dataclass(frozen=True)
class Size:
    """One run: its size and how fast it was. Times are seconds of a step."""

    name: str
    nodes: int
    gpus: int
    steps: int
    tokens: float
    """Of a step."""
    step: float
    phases: dict[str, float]
    """Of a step by phase; what is in none of them is "other"."""

    @property
    def tokens_per_second(self) -> float:
        """Of the whole run."""
        return self.tokens / self.step

    @property
    def tokens_per_gpu(self) -> float:
        """Per second."""
        return self.tokens_per_second / self.gpus


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return statistics.median(known) if known else math.nan


def size_of(run: RunRecord) -> Size:
    """How large a run was and how fast.

    Raises:
        InputError: the run has too few steps, no recipe, or metrics that lack lengths or times.
    """
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
        raise InputError(f"{run.folder}: its recipe.yaml is missing or not whole; run it again")
    devices, nodes, prompts, group = settings
    if len(run.metrics) < 2:
        raise InputError(
            f"{run.folder}: {len(run.metrics)} steps so far; a comparison needs at least 2, of "
            "which the first does not count"
        )

    def usual(key: str) -> float:
        value = _median(run.series(key)[1:])
        if math.isnan(value):
            raise InputError(f"{run.folder}: metrics.jsonl has no {key}; run it again")
        return value

    step = usual(m.STEP_TIME)
    phases = {phase.short: usual(phase) for phase in m.PHASES}
    phases["other"] = max(0.0, step - math.fsum(phases.values()))
    lengths = usual(m.PROMPT_TOKENS) + group * usual(m.COMPLETION_TOKENS)
    return Size(
        name=run.folder.name,
        nodes=nodes,
        gpus=devices * nodes,
        steps=len(run.metrics),
        tokens=prompts * lengths,
        step=step,
        phases=phases,
    )


def efficiencies(sizes: Sequence[Size]) -> list[float]:
    """Tokens per second and GPU, relative to the first of the sizes."""
    return [size.tokens_per_gpu / sizes[0].tokens_per_gpu for size in sizes]


def scaling_rows(sizes: Sequence[Size]) -> tuple[list[str], list[list[str]]]:
    """Heading and rows of the table."""
    heading = ["run", "nodes", "GPUs", "steps", "tokens/s", "tokens/s per GPU", "efficiency"]
    heading += ["step (s)", *(f"{phase} (s)" for phase in sizes[0].phases)]
    rows = [
        [
            size.name,
            str(size.nodes),
            str(size.gpus),
            str(size.steps),
            f"{size.tokens_per_second:,.0f}",
            f"{size.tokens_per_gpu:,.1f}",
            f"{efficiency:.0%}",
            f"{size.step:.2f}",
            *(f"{seconds:.2f}" for seconds in size.phases.values()),
        ]
        for size, efficiency in zip(sizes, efficiencies(sizes), strict=True)
    ]
    return heading, rows


def _draw(sizes: Sequence[Size], folder: Path) -> Curve:
    figure, (speed, share, time) = new_sheet(3)
    gpus = [size.gpus for size in sizes]
    _line(speed, gpus, [size.tokens_per_gpu for size in sizes])
    finish(speed, "Speed", "tokens/s per GPU", share=False, from_zero=True, keys=1, x="GPUs")
    values = efficiencies(sizes)
    _line(share, gpus, values)
    finish(
        share, "Efficiency", "share of the smallest", share=False, from_zero=True, keys=1, x="GPUs"
    )
    places = range(len(sizes))
    base = [0.0] * len(sizes)
    for colour, phase in zip((*COLOURS[: len(m.PHASES)], OTHER), sizes[0].phases, strict=True):
        seconds = [size.phases[phase] for size in sizes]
        time.bar(places, seconds, bottom=base, width=0.6, color=colour, label=phase)
        base = [a + b for a, b in zip(base, seconds, strict=True)]
    finish(time, "Time of a step", "seconds", share=False, from_zero=True, keys=5, x="GPUs")
    time.set_xticks(list(places), [str(count) for count in gpus])
    for axes in (speed, share):
        axes.set_xlim(0, 1.1 * max(gpus))
        axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
    return save(figure, folder, "scaling", "Speed, efficiency and phases by number of GPUs")


def _line(axes: Axes, gpus: Sequence[int], values: Sequence[float]) -> None:
    axes.plot(gpus, values, color=COLOURS[0], linewidth=1.6, marker="o", markersize=4)


def write_scaling_report(runs: Sequence[str | Path], folder: Path) -> tuple[Path, list[Size]]:
    """Draw `FOLDER/scaling.png` and write `FOLDER/scaling.html`, which holds it.

    Returns the page's path and the sizes, smallest first.

    Raises:
        InputError: a directory is no run, or a run can't be measured.
    """
    sizes = sorted((size_of(read_run(run)) for run in runs), key=lambda size: size.gpus)
    folder.mkdir(parents=True, exist_ok=True)
    curve = _draw(sizes, folder)
    text = page.document(
        "Scaling · nemo-care",
        [
            f"<header>\n{page.paragraph('nemo-care', 'soft')}\n<h1>Scaling</h1>\n</header>",
            page.section(
                "Sizes", page.table(*scaling_rows(sizes)), page.paragraph(_EXPLANATION, "soft")
            ),
            page.section("Figures", page.image(curve.file, curve.title, curve.width)),
        ],
    )
    target = folder / "scaling.html"
    with naming(target):
        target.write_text(text, encoding="utf-8", errors="replace")
    return target, sizes
