"""Train recipes with several seeds and compare their validation results.

A comparison is a study made in code, with a variant for each recipe.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_care.errors import InputError
from nemo_care.experiments.config import Study, Variant
from nemo_care.experiments.findings import Findings
from nemo_care.experiments.page import write_json
from nemo_care.experiments.processes import Failure
from nemo_care.experiments.runs import train_variants
from nemo_care.experiments.tables import comparison_sheet
from nemo_care.experiments.training_runs import (
    TrainingRun,
    key_of,
    refuse_own_keys,
    training_command,
)
from nemo_care.files.json_lines import read_object, replace_file
from nemo_care.process.screen import console
from nemo_care.reporting.tables import numbers, summary

_STEPS = "trainer.max_steps"
_HOW_TO_READ = (
    "One row per seed; mean ± sample standard deviation over seeds. Accuracy (acc) and "
    "consistency (cons) are shares of the validation prompts by level, after the last step."
)
_OF_A_RUN = ("steps", "wall_seconds", "start", "end")


def _asked_steps(overrides: Sequence[str]) -> int | None:
    """Return the number of steps in the overrides, None if they do not set it."""
    asked = None
    for override in overrides:
        if key_of(override) == _STEPS:
            value = override.partition("=")[2].strip()
            if not value.isdigit():
                raise InputError(f"{override}: must be a number of steps, at least 1")
            asked = int(value)
    return asked


def _check(
    recipes: Sequence[str], seeds: Sequence[int], overrides: Sequence[str], jobs: int
) -> None:
    if not recipes:
        raise InputError("no recipes to compare: name at least one")
    if not seeds:
        raise InputError("--seeds: name at least one seed")
    if jobs < 1:
        raise InputError(f"--jobs={jobs}: must be at least 1")
    refuse_own_keys(overrides, "compare", {})


def _claim(out: Path, overrides: Sequence[str]) -> None:
    """Reject runs with different overrides in one comparison, where they would seem comparable."""
    # The number of steps can change: such runs resume.
    settings = {"overrides": sorted(o for o in overrides if key_of(o) != _STEPS)}
    file = out / "overrides.json"
    if file.exists():
        remedy = f"give another --out, or remove {out}"
        if read_object(file, remedy=remedy) != settings:
            raise InputError(f"{file}: the runs there have different overrides; {remedy}")
        return
    out.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(settings, indent=2) + "\n")


def compare(
    recipes: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    overrides: Sequence[str],
    jobs: int,
    config_dir: str | None,
    *,
    train_command: Sequence[str] | None = None,
) -> list[Failure]:
    """Train every recipe with every seed, at most `jobs` at once, and compare the results.

    Runs are in `out/RECIPE-seedSEED`, their output in `out/logs/`. A run that has completed the
    requested number of steps is not trained again. Prints the table and writes
    `out/comparison.json`, `out/comparison.md` and `out/results.jsonl`. `overrides` are Hydra's and
    apply to all runs; `config_dir` is a folder with the user's own recipes; `train_command`
    replaces `python -m nemo_care.train`.

    Returns the runs that failed. The remaining runs continue; the command line then exits with 1.

    Raises:
        InputError: nothing to compare, an override of a key that compare itself sets, or runs
        with different overrides in `out`.
    """
    _check(recipes, seeds, overrides, jobs)
    asked = _asked_steps(overrides)
    # Absolute: a run can change its working directory before it reads the path.
    out = out.absolute()
    _claim(out, overrides)
    study = Study(
        title="Comparison",
        seeds=list(seeds),
        overrides=list(overrides),
        variants={recipe: Variant(recipe=recipe) for recipe in recipes},
    )
    runs = {
        recipe: [
            TrainingRun(
                recipe,
                study.overrides_of(recipe),
                seed,
                out / f"{recipe.replace('/', '_')}-seed{seed}",
                asked,
            )
            for seed in study.seeds_of(recipe)
        ]
        for recipe in study.variants
    }
    every = [run for made in runs.values() for run in made]
    command = training_command(train_command, config_dir)
    results, failures = train_variants(runs, every, command, out, jobs)
    failed = {failure.name for failure in failures}
    lost = {(run.recipe, run.seed) for run in every if run.name in failed}
    done = [one for one in results if (one.variant, one.seed) not in lost]
    _publish(Findings(study, done), runs, out)
    return failures


def _publish(findings: Findings, runs: Mapping[str, Sequence[TrainingRun]], out: Path) -> None:
    sheet, notes = comparison_sheet(findings), [_HOW_TO_READ, *findings.reading_notes()]
    screen = console()
    screen.print(sheet.rich())
    for note in notes:
        screen.print(note)
    write_json(out / "comparison.json", _record(findings, runs, notes))
    parts = ["# Comparison", sheet.markdown()]
    if findings.study.overrides:
        changed = ", ".join(f"`{override}`" for override in findings.study.overrides)
        parts.append(f"Overrides of the recipes: {changed}.")
    replace_file(out / "comparison.md", "\n\n".join([*parts, *notes]) + "\n")


def _record(
    findings: Findings, runs: Mapping[str, Sequence[TrainingRun]], notes: Sequence[str]
) -> dict[str, Any]:
    """Return all results of every run, and mean, deviation and count by recipe, level and key."""
    every, sums = [], {}
    for recipe, made in runs.items():
        done = findings.of(recipe)
        for run in made:
            one = done.get(run.seed)
            about = {"recipe": recipe, "seed": run.seed, "folder": run.name}
            about["status"] = "done" if one else "failed"
            found = {key: getattr(one, key, None) for key in _OF_A_RUN}
            every.append(about | found)
        sums[recipe] = {
            side: summary(numbers({seed: getattr(one, side) for seed, one in done.items()}))
            for side in ("start", "end")
        }
    overrides = findings.study.overrides
    return {"overrides": overrides, "runs": every, "summary": sums, "notes": notes}
