"""The report of a run: curves as PNG files and one page that works offline."""

import math
import os
import time
from pathlib import Path
from typing import Any

from nemo_care.reporting import page
from nemo_care.reporting.charts import HEIGHT, WIDTH, draw_charts
from nemo_care.reporting.curves import SMOOTHED_STEPS, draw_curves
from nemo_care.reporting.tables import result_notes, validation_sheet
from nemo_care.runs.files import step_of_file
from nemo_care.runs.metrics import CLIPPED_RATE, STEP_TIME
from nemo_care.runs.reader import RunRecord, read_run, read_summary

_SETTINGS = {
    "model": "model.hf_path",
    "group size": "algorithm.group_size",
    "prompts per step": "algorithm.prompts_per_step",
    "bonus coefficient": "algorithm.consistency.bonus_coefficient",
    "likelihood clip": "algorithm.consistency.likelihood_clip",
    "EMA decay": "algorithm.reference.ema_decay",
    "EMA update every (steps)": "algorithm.reference.ema_update_every",
    "KL coefficient": "algorithm.kl_coefficient",
    "learning rate": "optimizer.lr",
    "temperature": "rollout.temperature",
    "seed": "trainer.seed",
    "ranks per machine": "trainer.devices",
    "machines": "trainer.num_nodes",
}
_SHOWN_SKIPPED = 20
# The page warns if this share of likelihoods is at the clip, over this number of last steps.
_RECENT_STEPS = 10
_CLIPPED_WARNING = 0.9


def duration(seconds: float) -> str:
    """Format seconds for people: "43 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _recent_mean(run: RunRecord, key: str) -> float:
    import pandas as pd

    return pd.Series(run.series(key)[-_RECENT_STEPS:], dtype=float).mean()


def _state(run: RunRecord) -> str:
    if run.finished:
        return "Finished"
    asked = run.setting("trainer.max_steps")
    of = f" of {asked}" if isinstance(asked, int) else ""
    return f"Unfinished: {run.last_step}{of} steps so far"


def _facts(run: RunRecord) -> dict[str, Any]:
    import pandas as pd

    summary = run.summary or {}
    wall = summary.get("wall_seconds")
    # The first steps include warming up caches and kernels.
    usual = pd.Series(run.series(STEP_TIME), dtype=float).median()
    values: dict[str, Any] = {
        "steps": summary.get("steps", run.last_step),
        "wall time": duration(wall) if isinstance(wall, int | float) else None,
        "median time of a step": None if math.isnan(usual) else duration(usual),
        "samples skipped": summary.get("skipped", len(run.skipped)),
        "exported model": summary.get("export"),
    }
    return values | {name: _setting(run, key) for name, key in _SETTINGS.items()}


def _headline(run: RunRecord) -> str:
    """Describe the run in one line."""
    model = run.setting("model.hf_path")
    kind = run.setting("algorithm.consistency.kind")
    coefficient = run.setting("algorithm.consistency.bonus_coefficient")
    parts = [
        Path(str(model)).name if model else None,
        "GRPO, no bonus"
        if coefficient == 0
        else kind and f"{kind} bonus, coefficient {coefficient}",
        f"groups of {size}" if (size := run.setting("algorithm.group_size")) else None,
        f"{count} prompts per step"
        if (count := run.setting("algorithm.prompts_per_step"))
        else None,
    ]
    return " · ".join(part for part in parts if part)


def _setting(run: RunRecord, key: str) -> Any:
    """Return a key of the recipe, with the steps from which it had a different value."""
    changes = [change for change in run.recipe_changes if change.key == key]
    if not changes:
        return run.setting(key)
    later = (f"{change.new} from step {change.step} on" for change in changes)
    return ", ".join([str(changes[0].old), *later])


def _warnings(run: RunRecord) -> list[str]:
    warnings = []
    clipped = _recent_mean(run, CLIPPED_RATE)
    if run.setting("algorithm.consistency.bonus_coefficient") != 0 and clipped >= _CLIPPED_WARNING:
        warnings.append(
            f"In the last {min(_RECENT_STEPS, len(run.metrics))} steps {clipped:.0%} of the answer "
            "likelihoods are at the clip (algorithm.consistency.likelihood_clip): the reference is "
            "equally sure of nearly every answer, so the bonus hardly distinguishes completions."
        )
    return warnings


def _validated(run: RunRecord) -> str:
    """Describe the contents of the table of validations."""
    if run.start and run.end:
        done = "" if run.finished else f" (step {run.validations[-1]['step']})"
        return f"Before the first step → last validation{done}."
    if run.start or run.end:
        return "Before the first step." if run.start else "Last validation."
    return "This run has no validation results."


def _skipped(run: RunRecord) -> list[list[str]]:
    keys = ("sample_id", "reason")
    rows = [[str(one.get(key, "–")) for key in keys] for one in run.skipped[:_SHOWN_SKIPPED]]
    return [["sample", "reason"], *rows]


def _recipe_changes(run: RunRecord) -> list[list[str]]:
    rows = [[str(one.step), one.key, str(one.old), str(one.new)] for one in run.recipe_changes]
    return [["from step", "key", "before", "after"], *rows]


def write_report(run_dir: str | Path, refresh: int | None = None) -> Path:
    """Draw a run's curves to `RUN_DIR/report/` and write `RUN_DIR/report.html`.

    The page includes its images and refers to nothing outside. For an unfinished run it shows the
    results so far, and a browser reloads it every `refresh` seconds. Returns the page's path.

    Raises:
        InputError: not a run directory, or a file in it is damaged.
    """
    run = read_run(run_dir)
    curves = draw_curves(run, run.folder / "report")
    # Not resolve(): a run directory can be a link with a more informative name.
    name = Path(os.path.abspath(run.folder)).name
    files = dict.fromkeys([*run.rollout_files[:1], *run.rollout_files[-1:]])
    samples = {step_of_file(file) or 0: page.samples(file) for file in files}
    target = run.folder / "report.html"
    page.write_page(
        target,
        "report.html",
        title=name,
        kind="nemo-care training run",
        finished=run.finished,
        state=_state(run),
        refresh=None if run.finished else refresh,
        headline=_headline(run),
        charts=draw_charts(run),
        chart_size=(WIDTH, HEIGHT),
        warnings=_warnings(run),
        validated=_validated(run),
        validation=validation_sheet(run.start, run.end, prompts=True).lines(),
        notes=result_notes(run),
        facts=_facts(run),
        smoothed=len(run.metrics) > SMOOTHED_STEPS,
        curves=curves,
        samples={step: chosen for step, chosen in samples.items() if chosen},
        skipped=_skipped(run),
        more_skipped=max(0, len(run.skipped) - _SHOWN_SKIPPED),
        recipe=(run.folder / "recipe.yaml").read_text(encoding="utf-8") if run.recipe else "",
        recipe_changes=_recipe_changes(run) if run.recipe else [],
    )
    return target


def follow_report(run_dir: Path, seconds: int) -> Path:
    """Write the report again and again until the run is finished; as `write_report`."""
    while True:
        write_report(run_dir, refresh=seconds)
        if read_summary(run_dir) is not None:
            # It may have finished since the page was written.
            return write_report(run_dir)
        time.sleep(seconds)
