"""The report of a run: curves as PNG files and one page that works offline."""

import math
import os
from pathlib import Path
from typing import Any

from nemo_care.process.os_errors import naming
from nemo_care.reporting import page
from nemo_care.reporting.curves import SMOOTHED_STEPS, draw_curves
from nemo_care.reporting.tables import result_notes, validation_sheet
from nemo_care.runs.files import step_of_file
from nemo_care.runs.reader import RunRecord, read_run

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
# Over so many last steps, and from this share of likelihoods at the clip on, the page warns.
_RECENT_STEPS = 10
_CLIPPED_WARNING = 0.9


def duration(seconds: float) -> str:
    """Seconds as a person says them: "43 s", "12 min 5 s", "3 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _recent_mean(run: RunRecord, key: str) -> float:
    known = [value for value in run.series(key)[-_RECENT_STEPS:] if not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _state(run: RunRecord) -> str:
    if run.finished:
        return '<p class="state good">Finished</p>'
    asked = run.setting("trainer.max_steps")
    of = f" of {asked}" if isinstance(asked, int) else ""
    return page.paragraph(f"Unfinished: {run.last_step}{of} steps so far", "state bad")


def _facts(run: RunRecord) -> dict[str, Any]:
    summary = run.summary or {}
    times = [value for value in run.series("timing/step") if not math.isnan(value)]
    wall = summary.get("wall_seconds")
    # The first steps also warm up caches and kernels.
    usual = sorted(times)[len(times) // 2] if times else None
    values: dict[str, Any] = {
        "steps": summary.get("steps", run.last_step),
        "wall time": duration(wall) if isinstance(wall, int | float) else None,
        "median time of a step": duration(usual) if usual is not None else None,
        "samples skipped": summary.get("skipped", len(run.skipped)),
        "exported model": summary.get("export"),
    }
    return values | {name: _setting(run, key) for name, key in _SETTINGS.items()}


def _setting(run: RunRecord, key: str) -> Any:
    """A key of the recipe, with the steps from which it had another value."""
    changes = [change for change in run.recipe_changes if change.key == key]
    if not changes:
        return run.setting(key)
    later = (f"{change.new} from step {change.step} on" for change in changes)
    return ", ".join([str(changes[0].old), *later])


def _warnings(run: RunRecord) -> list[str]:
    warnings = []
    clipped = _recent_mean(run, "care/clipped_rate")
    if run.setting("algorithm.consistency.bonus_coefficient") != 0 and clipped >= _CLIPPED_WARNING:
        warnings.append(
            f"In the last {min(_RECENT_STEPS, len(run.metrics))} steps {clipped:.0%} of the answer "
            "likelihoods lie at the clip (algorithm.consistency.likelihood_clip): the reference is "
            "as sure of nearly every answer, so the bonus hardly tells completions apart."
        )
    return warnings


def _validation(run: RunRecord) -> str:
    start, end = run.start, run.end
    if not (start or end):
        return page.paragraph("This run has no validation results.", "soft")
    if start and end:
        done = "" if run.finished else f" (step {run.validations[-1]['step']})"
        caption = f"Before the first step → last validation{done}."
    else:
        caption = "Before the first step." if start else "Last validation."
    notes = [page.paragraph(note, "soft") for note in result_notes(run)]
    table = validation_sheet(start, end, prompts=True).html()
    return "\n".join([page.paragraph(caption, "soft"), table, *notes])


def _samples(run: RunRecord) -> str:
    files = list(dict.fromkeys([*run.rollout_files[:1], *run.rollout_files[-1:]]))
    parts = [page.samples(file, step_of_file(file) or 0) for file in files]
    if not any(parts):
        return ""
    how = (
        "Not a random choice: the best and the worst rewarded completion of the two groups whose "
        "rewards differ most."
    )
    return "\n".join([page.paragraph(how, "soft"), *parts])


def _skipped(run: RunRecord) -> str:
    if not run.skipped:
        return ""
    rows = [
        [str(record.get(key, "–")) for key in ("sample_id", "reason")]
        for record in run.skipped[:_SHOWN_SKIPPED]
    ]
    more = len(run.skipped) - len(rows)
    rest = page.paragraph(f"and {more} more in skipped.jsonl", "soft") if more > 0 else ""
    return page.table(["sample", "reason"], rows) + rest


def _recipe(run: RunRecord) -> str:
    if not run.recipe:
        return ""
    text = (run.folder / "recipe.yaml").read_text(encoding="utf-8")
    keys = page.folded("All keys", page.preformatted(text))
    if not run.recipe_changes:
        return keys
    rows = [
        [str(change.step), change.key, str(change.old), str(change.new)]
        for change in run.recipe_changes
    ]
    note = page.paragraph("Changed while the run went on; below is the recipe of the last step.")
    return note + page.table(["from step", "key", "before", "after"], rows) + keys


def write_report(run_dir: str | Path) -> Path:
    """Draw a run's curves to `RUN_DIR/report/` and write `RUN_DIR/report.html`.

    The page holds its images itself and refers to nothing outside it. An unfinished run gets a
    report of what there is so far. Returns the page's path.

    Raises:
        InputError: not a run directory, or a broken file in it.
    """
    run = read_run(run_dir)
    curves = draw_curves(run, run.folder / "report")
    # Not resolve(): a run directory may be a link whose own name says more.
    name = Path(os.path.abspath(run.folder)).name
    text = page.document(
        f"{name} · nemo-care",
        [
            f"<header>\n{page.paragraph('nemo-care training run', 'soft')}\n"
            f"<h1>{page.escape(name)}</h1>\n{_state(run)}\n</header>",
            *(page.paragraph(warning, "warning") for warning in _warnings(run)),
            page.section("Validation", _validation(run)),
            page.section("Run", page.facts(_facts(run))),
            page.section(
                "Curves",
                page.paragraph("Faint: each step. Strong: running mean.", "soft")
                if len(run.metrics) > SMOOTHED_STEPS
                else "",
                "".join(page.image(curve.file, curve.title, curve.width) for curve in curves)
                or page.paragraph("No step is done yet.", "soft"),
            ),
            page.section("Sampled completions", _samples(run)),
            page.section("Samples left out", _skipped(run)),
            page.section("Recipe", _recipe(run)),
        ],
    )
    target = run.folder / "report.html"
    # Lone surrogates can stand in JSON and can't be written as UTF-8.
    with naming(target):
        target.write_text(text, encoding="utf-8", errors="replace")
    return target
