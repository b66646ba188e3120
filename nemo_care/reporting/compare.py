"""Train recipes with several seeds and set their validation results side by side."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_care.errors import InputError
from nemo_care.reporting.comparison import Comparison, Outcome
from nemo_care.reporting.processes import Failure, Job, last_lines, run_jobs
from nemo_care.reporting.reader import last_step, read_run, read_summary
from nemo_care.reporting.tables import result_notes

_OWN_KEYS = {
    "trainer.seed": "--seeds",
    "exp_manager.explicit_log_dir": "--out",
    "exp_manager.exp_dir": "--out",
}
_STEPS = "trainer.max_steps"
# What Hydra reads as a plain value; anything else has to stand in quotes.
_PLAIN = re.compile(r"[\w/\-+.@:%]+")


@dataclass(frozen=True)
class _Run:
    recipe: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


def _key(override: str) -> str:
    return override.split("=", 1)[0].lstrip("+~")


def _quoted(text: str) -> str:
    """A value as Hydra's override grammar reads it back."""
    if _PLAIN.fullmatch(text):
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", text) + "'"


def _asked_steps(overrides: Sequence[str]) -> int | None:
    """Steps that the overrides ask for, None where that is left to the recipe."""
    asked = None
    for override in overrides:
        if _key(override) == _STEPS:
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
    for override in overrides:
        if _key(override) in _OWN_KEYS:
            raise InputError(
                f"{override}: compare sets {_key(override)} for each run; "
                f"use {_OWN_KEYS[_key(override)]}"
            )


def _claim(out: Path, overrides: Sequence[str]) -> None:
    """Keep runs with other overrides out of one comparison: they would be taken for equal ones."""
    # The number of steps may change: such runs go on.
    settings = {"overrides": sorted(o for o in overrides if _key(o) != _STEPS)}
    file = out / "overrides.json"
    if file.exists():
        if json.loads(file.read_text(encoding="utf-8")) != settings:
            raise InputError(
                f"{file}: the runs there have other overrides; give another --out or remove {out}"
            )
        return
    out.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _is_done(folder: Path, asked: int | None) -> bool:
    summary = read_summary(folder)
    return summary is not None and asked in (None, summary.get("steps"))


def _outcome(run: _Run, failure: Failure | None) -> Outcome:
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


def _unfinished(folder: Path, asked: int | None) -> str | None:
    """What is wrong with a run whose command said that all went well."""
    summary = read_summary(folder)
    if summary is None:
        return "the command ended without writing summary.json"
    if asked not in (None, summary.get("steps")):
        return f"ended with {summary.get('steps')} steps where {asked} were asked for"
    return None


def _train(
    runs: Sequence[_Run],
    commands: Mapping[str, list[str]],
    out: Path,
    jobs: int,
    asked: int | None,
    done_before: int,
) -> list[Failure]:
    folders = {run.name: run.folder for run in runs}
    queue = [Job(run.name, commands[run.name], out / "logs" / f"{run.name}.log") for run in runs]
    failures: list[Failure] = []
    with tqdm(
        total=done_before + len(runs),
        initial=done_before,
        desc="runs",
        unit="run",
        disable=None,  # in a log file only the lines below
    ) as bar:

        def tick(names: list[str]) -> None:
            steps = (f"{name} step {last_step(folders[name])}" for name in names)
            bar.set_postfix_str(", ".join(steps))

        def done(job: Job, failure: Failure | None) -> None:
            wrong = None if failure else _unfinished(folders[job.name], asked)
            if wrong:
                failure = Failure(job.name, 0, job.log, [*last_lines(job.log), wrong])
            if failure:
                failures.append(failure)
                lines = "".join(f"\n    {line}" for line in failure.last_lines)
                said = f"failed (exit status {failure.status}), log {failure.log}{lines}"
            else:
                said = f"done, {last_step(folders[job.name])} steps"
            tqdm.write(f"{job.name}: {said}", file=sys.stderr)
            bar.update()

        run_jobs(queue, jobs, tick=tick, done=done)
    return failures


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
    command = list(train_command or (sys.executable, "-m", "nemo_care.train"))
    where = ["--config-path", str(Path(config_dir).absolute())] if config_dir else []
    runs = [
        _Run(recipe, seed, out / f"{recipe.replace('/', '_')}-seed{seed}")
        for recipe in dict.fromkeys(recipes)
        for seed in dict.fromkeys(seeds)
    ]
    waiting = [run for run in runs if not _is_done(run.folder, asked)]
    commands: dict[str, list[str]] = {
        run.name: [
            *command,
            *where,
            "--config-name",
            run.recipe,
            f"trainer.seed={run.seed}",
            f"exp_manager.explicit_log_dir={_quoted(str(run.folder))}",
            *overrides,
        ]
        for run in waiting
    }
    failures = _train(waiting, commands, out, jobs, asked, len(runs) - len(waiting))
    failed = {failure.name: failure for failure in failures}
    outcomes = [_outcome(run, failed.get(run.name)) for run in runs]
    _publish(Comparison(outcomes, tuple(overrides)), out)
    return failures


def _publish(comparison: Comparison, out: Path) -> None:
    from rich.console import Console

    console = Console()
    console.print(comparison.table())
    for note in comparison.notes():
        console.print(note, highlight=False)
    record: dict[str, Any] = comparison.as_json()
    (out / "comparison.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    (out / "comparison.md").write_text(comparison.markdown(), encoding="utf-8")
