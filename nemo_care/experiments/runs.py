"""The runs of a study: their arguments, their training, and checks that they are unchanged."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_care.errors import InputError
from nemo_care.experiments.config import Study
from nemo_care.experiments.processes import Failure
from nemo_care.experiments.results import RESULTS, Result, read_result
from nemo_care.experiments.training_runs import TrainingRun, train_runs
from nemo_care.files.json_lines import read_object, replace_file, replace_lines
from nemo_care.recipe.compose import compose_recipe

_MADE_WITH = "study.json"


def study_runs(study: Study, out: Path, config_dir: str | None) -> dict[str, list[TrainingRun]]:
    """Return all runs by variant, one per seed.

    Every variant's recipe is composed and checked here, so that a mistyped override is reported
    before the first run, not after hours.

    Raises:
        InputError: a variant whose recipe can't be used.
    """
    where = ["--config-path", config_dir] if config_dir else []
    runs: dict[str, list[TrainingRun]] = {}
    for name in study.variants:
        overrides = study.overrides_of(name)
        arguments = [*where, "--config-name", study.recipe_of(name), *overrides]
        try:
            recipe = compose_recipe(arguments)
        except InputError as error:
            raise InputError(f"variant {name}: {error}") from error
        steps = recipe.trainer.max_steps if recipe else None
        runs[name] = [
            TrainingRun(
                study.recipe_of(name),
                overrides,
                seed,
                out.absolute() / "runs" / f"{name}-seed{seed}",
                steps,
            )
            for seed in study.seeds_of(name)
        ]
    return runs


def check_unchanged(runs: Mapping[str, Sequence[TrainingRun]]) -> None:
    """Reject runs that were made with different arguments, which would seem comparable.

    Raises:
        InputError: names the run and its variant.
    """
    for name, made in runs.items():
        for run in made:
            file, now = run.folder / _MADE_WITH, _made_with(run)
            if file.exists():
                before = read_object(
                    file,
                    remedy=f"remove {run.folder}: it is then trained again",
                    required={"recipe": str, "overrides": list[str], "seed": int},
                )
            elif (run.folder / "recipe.yaml").exists():
                raise InputError(f"variant {name}: {run.folder} is not of this study; remove it")
            else:
                continue
            if before != now:
                raise InputError(
                    f"variant {name} has changed since {run.folder} was made: with "
                    f'"{_words(before)}" then, with "{_words(now)}" now; remove its runs, call '
                    "the variant something else or give another --out"
                )


def claim(runs: Sequence[TrainingRun]) -> None:
    """Record beside each run what it is made with."""
    for run in runs:
        file = run.folder / _MADE_WITH
        if not file.exists():
            run.folder.mkdir(parents=True, exist_ok=True)
            replace_file(file, json.dumps(_made_with(run), indent=2) + "\n")


def train_variants(
    runs: Mapping[str, Sequence[TrainingRun]],
    asked: Sequence[TrainingRun],
    command: Sequence[str],
    out: Path,
    jobs: int,
) -> tuple[list[Result], list[Failure]]:
    """Train those of `runs` that were `asked` for, and return all completed results.

    The runs' output is written to `out/logs/`; `out/results.jsonl` has a line per finished run.
    """
    known: dict[TrainingRun, Result] = {}

    def results() -> list[Result]:
        """Read the runs that have finished since the last call, and rewrite the file."""
        for variant, made in runs.items():
            for run in made:
                if run not in known and run.is_done():
                    known[run] = read_result(variant, run)
        found = [known[run] for made in runs.values() for run in made if run in known]
        replace_lines(out / RESULTS, [vars(result) for result in found])
        return found

    out.mkdir(parents=True, exist_ok=True)
    results()
    # A killed study keeps its results so far.
    failures = train_runs(asked, command, out / "logs", jobs, ended=results)
    return results(), failures


def _made_with(run: TrainingRun) -> dict[str, Any]:
    """Return the settings that identify a run, without its folder, which can move."""
    return {"recipe": run.recipe, "overrides": list(run.overrides), "seed": run.seed}


def _words(made_with: Mapping[str, Any]) -> str:
    return " ".join([str(made_with.get("recipe")), *map(str, made_with.get("overrides", []))])
