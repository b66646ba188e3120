"""Read a run directory, even if it is unfinished or was killed while writing."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_care.errors import InputError
from nemo_care.files.json_lines import Kinds, Record, complete_lines, read_object
from nemo_care.runs.files import METRICS, SKIPPED, STARTS, VALIDATION, step_of_file

Levels = Mapping[str, Mapping[str, Any]]

_SUMMARY: Kinds = {
    "steps": int,
    "wall_seconds": float | None,
    "export": str | None,
    "skipped": int,
    "bad_steps": int,
    "start": dict[str, dict] | None,
    "end": dict[str, dict] | None,
}


@dataclass(frozen=True)
class RecipeChange:
    """A key of the recipe whose value changes at a step."""

    step: int
    key: str
    old: Any
    new: Any


@dataclass(frozen=True)
class RunRecord:
    """The contents of a run directory, in the order of the steps."""

    folder: Path
    metrics: list[Record]
    """One record per optimizer step; values may be None."""
    validations: list[Record]
    """`step` and `levels` of each validation."""
    skipped: list[Record]
    """Skipped samples: index, sample_id, reason."""
    rollout_files: list[Path]
    """One file per step."""
    recipe: Record
    """The resolved recipe of the last steps; empty if the run wrote none."""
    summary: Record | None
    """None while the run is unfinished."""
    recipe_changes: list[RecipeChange] = field(default_factory=list)
    """Keys that a later start changed, in the order of the steps."""

    @property
    def finished(self) -> bool:
        """Whether the run has reached its end."""
        return self.summary is not None

    @property
    def last_step(self) -> int:
        """Optimizer steps done; 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def start(self) -> Levels | None:
        """The validation before the first step, None if there was none."""
        if self.summary and self.summary.get("start"):
            return self.summary["start"]
        first = self.validations[0] if self.validations else None
        return first["levels"] if first and first["step"] == 0 else None

    @property
    def end(self) -> Levels | None:
        """The last validation after training began (of an unfinished run: so far)."""
        if self.summary and self.summary.get("end"):
            return self.summary["end"]
        last = self.validations[-1] if self.validations else None
        return last["levels"] if last and last["step"] > 0 else None

    def setting(self, key: str) -> Any:
        """Return the value of a recipe key such as "algorithm.group_size"; None if it is
        missing."""
        value: Any = self.recipe
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def steps(self) -> list[int]:
        """Return the steps that have metrics."""
        return [record["step"] for record in self.metrics]

    def series(self, key: str) -> list[float]:
        """Return a metric over `steps()`; NaN where it is null, missing or not a number."""
        return [number(record.get(key)) for record in self.metrics]


def number(value: Any) -> float:
    """Return a record's value as a float; NaN if it is None, not a number or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return math.nan
    return float(value)


def last_step(folder: Path) -> int:
    """Return the newest step in metrics.jsonl, 0 if none; reads only the end of the file."""
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 16384))
            lines = file.read().split(b"\n")
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            continue  # empty, torn, or the middle of a longer line
    return 0


def read_summary(folder: Path) -> Record | None:
    """Return summary.json of a run, None if the run is unfinished.

    Raises:
        InputError: the file can't be read, or is not a summary.
    """
    file = folder / "summary.json"
    if not file.exists():
        return None
    return read_object(file, remedy="remove it and run again", optional=_SUMMARY)


def _read_recipe(file: Path) -> Record:
    if not file.exists():
        return {}
    from omegaconf import OmegaConf

    from nemo_care.recipe.compose import load_recipe_file

    recipe = OmegaConf.to_container(load_recipe_file(file), resolve=False)
    assert isinstance(recipe, dict)
    return {str(key): value for key, value in recipe.items()}


def rollout_files(folder: Path) -> list[Path]:
    """Return the files of a run's completions, one per step and in order; skips unknown files."""
    files = (folder / "rollouts").glob("step_*.jsonl")
    found = [(step, file) for file in files if (step := step_of_file(file)) is not None]
    return [file for _, file in sorted(found)]


def _recipe_changes(starts: list[Record]) -> list[RecipeChange]:
    """Return the changes between kept steps; a start without steps changed nothing."""
    changes: list[RecipeChange] = []
    for start in starts:
        first = start.get("first_step")
        if first is None:
            continue
        # It resumed before those steps and repeated them.
        changes = [change for change in changes if change.step < first]
        for key, (old, new) in start.get("changed", {}).items():
            changes.append(RecipeChange(first, key, old, new))
    return changes


def read_run(path: str | Path) -> RunRecord:
    """Read a run directory.

    Raises:
        InputError: it is not a run directory, or a file is damaged (the message names the line).
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such directory; give the run directory of a training run")
    if not any((folder / name).exists() for name in ("metrics.jsonl", "recipe.yaml")):
        raise InputError(
            f"{folder}: holds neither metrics.jsonl nor recipe.yaml; give the run directory of a "
            "training run"
        )
    return RunRecord(
        folder=folder,
        metrics=complete_lines(folder / "metrics.jsonl", METRICS),
        validations=complete_lines(folder / "validation.jsonl", VALIDATION),
        skipped=complete_lines(folder / "skipped.jsonl", optional=SKIPPED),
        rollout_files=rollout_files(folder),
        recipe=_read_recipe(folder / "recipe.yaml"),
        summary=read_summary(folder),
        recipe_changes=_recipe_changes(complete_lines(folder / "starts.jsonl", optional=STARTS)),
    )
