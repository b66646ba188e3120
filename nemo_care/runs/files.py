"""The files of a run directory; written by rank 0 only.

nemo_care_run.json          marks the folder as a run's (see directory.py)
run.lock                    while a command works there (see lock.py)
recipe.yaml                 the resolved recipe of the last step, or of the first start
starts.jsonl                one JSON object per start: commit, versions, machine; the step after
                            which it resumed, the keys that differ from the recipe of that
                            checkpoint (old and new value), and the first step that it made, if any
metrics.jsonl               one JSON object per optimizer step
rollouts/step_000001.jsonl  one line per completion (see training/records.py)
bad_steps/step_000012.json  a step that was left out: what was not finite, and its rollouts
                            (tensors in the .safetensors beside it; see groups/files.py);
                            kept when the run resumes from an earlier checkpoint
validation.jsonl            one JSON object per validation
skipped.jsonl               unusable samples and lines of the annotations, with the reason
damaged_checkpoints.jsonl   unusable checkpoints, with the reason
evaluation/                 see evaluation/files.py
checkpoints/step_000010/    see checkpoints/store.py
export/                     the trained model as a Hugging Face directory
summary.json                written when the run is done
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_care.errors import RunFailed
from nemo_care.files.json_lines import (
    Kinds,
    Record,
    append_lines,
    complete_lines,
    replace_file,
    replace_lines,
    sync_file,
    sync_folder,
)
from nemo_care.runs.directory import MARKER, mark_saved

METRICS: Kinds = {"step": int}
VALIDATION: Kinds = {"step": int, "levels": dict[str, dict]}
STARTS: Kinds = {"first_step": int, "changed": dict[str, list]}
SKIPPED: Kinds = {"step": int, "index": int | None, "sample_id": str, "reason": str}
_STEP_FILE = re.compile(r"step_([0-9]+)\.jsonl?")


def step_of_file(file: Path) -> int | None:
    """Return the step of a file in `rollouts/` or `bad_steps/`; None for any other file."""
    match = _STEP_FILE.fullmatch(file.name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class Start:
    """The recipe of a start of the run.

    `recipe` is the resolved recipe as YAML; `changes` has the keys in which it differs from the
    checkpoint's recipe, with the old and the new value.
    """

    origin: Mapping[str, Any]
    recipe: str
    changes: Callable[[int], Mapping[str, Any]]


class RunFiles:
    """Writes the files of one run."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`, which is created if missing."""
        self.folder = folder
        self.checkpoints = self.checkpoints_of(folder)
        self.export = folder / "export"
        self.bad_steps = folder / "bad_steps"
        self.recipe = folder / "recipe.yaml"
        self._metrics = folder / "metrics.jsonl"
        self._skipped = folder / "skipped.jsonl"
        self._validation = folder / "validation.jsonl"
        self._rollouts = folder / "rollouts"
        self._starts = folder / "starts.jsonl"
        self._rollouts.mkdir(parents=True, exist_ok=True)
        # Set by the train command before the run resumes.
        self.start: Start | None = None
        self._has_made_a_step = False
        self._unsynced: set[Path] = set()

    @staticmethod
    def checkpoints_of(folder: Path) -> Path:
        """Return the folder of a run's checkpoints."""
        return folder / "checkpoints"

    def bad_step(self, step: int) -> Path:
        """Return the file that describes a step that was left out."""
        return self.bad_steps / f"step_{step:06d}.json"

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn an operating system error in the block into one sentence.

        Raises:
            RunFailed: the disk is full, or not writable.
        """
        try:
            yield
        except OSError as error:
            raise RunFailed(
                f"{what} could not be written to {self.folder}: {error}; make room or repair the "
                "folder, then repeat the command: it resumes from the newest checkpoint"
            ) from error

    def write_recipe(self, text: str) -> None:
        """Write the resolved recipe, as YAML."""
        replace_file(self.recipe, text)

    def append_start(self, start: Mapping[str, Any]) -> None:
        """Write the description of this start of the run."""
        replace_lines(self._starts, [*complete_lines(self._starts), start])

    def go_on(self, step: int) -> Record:
        """Begin this start's records after `step`, and return what was found.

        The recipe becomes the run's with its first step: a start without steps changes nothing.

        Returns:
            `after_step`, `changed` (key: [old, new]) and `missing_steps`, whose metrics were lost
            in a crash of the machine.
        """
        missing = self.rewind(step)
        changed = self.start.changes(step) if self.start is not None and step else {}
        about = {"after_step": step, "changed": dict(changed), "missing_steps": missing}
        if self.start is not None:
            self.append_start({**self.start.origin, **about})
            if not step:
                self.write_recipe(self.start.recipe)
        return about

    def _begin_steps(self, step: int) -> None:
        """Prepare the records of this start's first step: from now on the run is this start's."""
        if self._has_made_a_step:
            return
        self._has_made_a_step = True
        if self.start is not None:
            *before, last = complete_lines(self._starts)
            replace_lines(self._starts, [*before, {**last, "first_step": step}])
            self.write_recipe(self.start.recipe)
        # The summary marks a finished run.
        (self.folder / "summary.json").unlink(missing_ok=True)

    def rewind(self, step: int) -> list[int]:
        """Delete what was written after `step`, since those steps are repeated; 0 deletes all.

        Returns:
            The steps up to `step` that have no metrics.

        Raises:
            InputError: a line to keep is damaged; nothing is deleted then.
        """
        kinds = {self._metrics: METRICS, self._validation: VALIDATION, self._skipped: SKIPPED}
        read = {file: complete_lines(file, kind) if step else [] for file, kind in kinds.items()}
        for file, records in read.items():
            kept = [record for record in records if record["step"] <= step]
            if file.exists() or file is self._skipped:
                replace_lines(file, kept)
        for file in self._rollouts.glob("step_*.jsonl"):
            if (step_of_file(file) or 0) > step:
                file.unlink()
        made = {record["step"] for record in complete_lines(self._metrics)}
        return [number for number in range(1, step + 1) if number not in made]

    def sync(self) -> None:
        """Write to disk what was recorded since the last call.

        Raises:
            RunFailed: the disk does not accept it.
        """
        with self.writing("the records"):
            records = (self._metrics, self._validation, self._skipped, self._starts, self.recipe)
            for file in (*sorted(self._unsynced), *records):
                if file.exists():
                    sync_file(file)
            for folder in (self._rollouts, self.folder):
                sync_folder(folder)
            self._unsynced.clear()

    def list_skipped_once(self, step: int, skipped: Iterable[Mapping[str, Any]]) -> None:
        """List recurring problems once, however often a run starts or validates.

        These are lines of the annotations that gave no sample, and validation samples (with their
        `level`). What has become unusable since the last start is listed with that step.
        """

        def identity(record: Mapping[str, Any]) -> tuple[Any, ...]:
            return record.get("level"), record["index"], record["reason"]

        listed = {identity(record) for record in complete_lines(self._skipped, SKIPPED)}
        new = {identity(record): record for record in skipped if identity(record) not in listed}
        append_lines(self._skipped, [{"step": step, **record} for record in new.values()])

    def append_step(
        self,
        step: int,
        metrics: Mapping[str, Any],
        rows: Iterable[Mapping[str, Any]],
        skipped: Iterable[Mapping[str, Any]],
    ) -> None:
        """Write one optimizer step: completions, skipped samples, and finally its metrics.

        Raises:
            RunFailed: the disk is full, or not writable.
        """
        rollouts = self._rollouts / f"step_{step:06d}.jsonl"
        with self.writing(f"the records of step {step}"):
            self._begin_steps(step)
            replace_lines(rollouts, rows)
            self._unsynced.add(rollouts)
            self.append_skipped(step, skipped)
            append_lines(self._metrics, [{"step": step, **metrics}])

    def mark_saved(self) -> None:
        """Record that the run has completed a checkpoint (see directory.py).

        Raises:
            RunFailed: the disk is full, or not writable.
        """
        with self.writing(MARKER):
            mark_saved(self.folder)

    def append_skipped(self, step: int, skipped: Iterable[Mapping[str, Any]]) -> None:
        """List the training samples that a step skipped."""
        append_lines(self._skipped, [{"step": step, **record} for record in skipped])

    def append_damaged(self, checkpoint: str, reason: str, aside: str) -> None:
        """Record an unusable checkpoint, and its new name."""
        record = {"checkpoint": checkpoint, "reason": reason, "set_aside_as": aside}
        append_lines(self.folder / "damaged_checkpoints.jsonl", [record])

    def append_validation(self, step: int, levels: Mapping[str, Any]) -> None:
        """Write one validation."""
        append_lines(self._validation, [{"step": step, "levels": levels}])

    def validations(self) -> dict[int, dict[str, Any]]:
        """Return the results by level of each validation so far, by step."""
        records = complete_lines(self._validation, VALIDATION)
        return {record["step"]: record["levels"] for record in records}

    def skipped_in_training(self) -> list[dict[str, Any]]:
        """Return `index`, `sample_id` and `reason` of the training samples skipped so far."""
        return [
            {key: record[key] for key in ("index", "sample_id", "reason")}
            for record in complete_lines(self._skipped, SKIPPED)
            # Lines of annotations have no index, and validation's samples have a level.
            if record["index"] is not None and "level" not in record
        ]

    def skipped_count(self) -> int:
        """Return the number of samples skipped so far."""
        return len(complete_lines(self._skipped))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary, which marks a finished run."""
        replace_file(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
