"""Train recipes with several seeds and set their validation results side by side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_care.errors import InputError
from nemo_care.experiments.comparison import Comparison, Outcome
from nemo_care.experiments.processes import Failure
from nemo_care.experiments.training_runs import (
    TrainingRun,
    key_of,
    refuse_own_keys,
    train_runs,
    training_command,
)
from nemo_care.files.json_lines import read_object, replace_file
from nemo_care.process.screen import console
from nemo_care.reporting.tables import result_notes
from nemo_care.runs.reader import read_run

_STEPS = "trainer.max_steps"


def _asked_steps(overrides: Sequence[str]) -> int | None:
    """Steps that the overrides ask for, None where that is left to the recipe."""
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
    """Keep runs with other overrides out of one comparison: they would be taken for equal ones."""
    # The number of steps may change: such runs go on.
    settings = {"overrides": sorted(o for o in overrides if key_of(o) != _STEPS)}
    file = out / "overrides.json"
    if file.exists():
        remedy = f"give another --out, or remove {out}"
        if read_object(file, remedy=remedy) != settings:
            raise InputError(f"{file}: the runs there have other overrides; {remedy}")
        return
    out.mkdir(parents=True, exist_ok=True)
    replace_file(file, json.dumps(settings, indent=2) + "\n")


def _outcome(run: TrainingRun, failure: Failure | None) -> Outcome:
    if failure is not None:
        return Outcome(run.recipe, run.seed, run.name, "failed")
    record = read_run(run.folder)
    summary = record.summary or {}
    return Outcome(
        run.recipe,
        run.seed,
        run.name,
        "done",
        steps=summary.get("steps"),
        wall_seconds=summary.get("wall_seconds"),
        start=record.start,
        end=record.end,
        notes=tuple(result_notes(record)),
    )


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

    Runs lie in `out/RECIPE-seedSEED`, their output in `out/logs/`. A finished run with the asked
    number of steps is not trained again. Prints the table and writes `out/comparison.json` and
    `out/comparison.md`. `overrides` are Hydra's and hold for all runs; `config_dir` is a folder
    of the user's own recipes; `train_command` stands in for `python -m nemo_care.train`.

    Returns the runs that failed: the others go on, and the command line then exits with 1.

    Raises:
        InputError: nothing to compare, an override of a key that compare itself sets, or runs
            with other overrides in `out`.
    """
    _check(recipes, seeds, overrides, jobs)
    asked = _asked_steps(overrides)
    # Absolute: a run may change its working directory before it reads the path.
    out = out.absolute()
    _claim(out, overrides)
    runs = [
        TrainingRun(
            recipe,
            tuple(overrides),
            seed,
            out / f"{recipe.replace('/', '_')}-seed{seed}",
            asked,
        )
        for recipe in dict.fromkeys(recipes)
        for seed in dict.fromkeys(seeds)
    ]
    failures = train_runs(runs, training_command(train_command, config_dir), out / "logs", jobs)
    failed = {failure.name: failure for failure in failures}
    outcomes = [_outcome(run, failed.get(run.name)) for run in runs]
    _publish(Comparison(outcomes, tuple(overrides)), out)
    return failures


def _publish(comparison: Comparison, out: Path) -> None:
    screen = console()
    screen.print(comparison.table())
    for note in comparison.notes():
        screen.print(note)
    record: dict[str, Any] = comparison.as_json()
    replace_file(out / "comparison.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    replace_file(out / "comparison.md", comparison.markdown())
