"""The files of a run directory; written by rank 0 only.

recipe.yaml                 the resolved recipe
metrics.jsonl               one JSON object per optimizer step
rollouts/step_000001.jsonl  one line per completion
validation.jsonl            one JSON object per validation
skipped.jsonl               samples and lines of the annotations left out, and why
checkpoints/step_000010/    see parallel/checkpoints.py
export/                     the trained model as a Hugging Face directory
summary.json                written when the run is done
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _complete_lines(file: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; a line torn by a kill can only be the last and is dropped."""
    if not file.exists():
        return []
    # Not splitlines(): it also splits at characters that JSON leaves as they are.
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def _replace(file: Path, text: str) -> None:
    """Write a file so that a reader or a kill sees the old or the new one, never half of it."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    os.replace(partial, file)


class RunFiles:
    """Writes the files of one run."""

    def __init__(self, folder: Path) -> None:
        """`folder` is made when missing."""
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.export = folder / "export"
        self.recipe = folder / "recipe.yaml"
        self._metrics = folder / "metrics.jsonl"
        self._skipped = folder / "skipped.jsonl"
        self._validation = folder / "validation.jsonl"
        self._rollouts = folder / "rollouts"
        self._rollouts.mkdir(parents=True, exist_ok=True)

    def write_recipe(self, text: str) -> None:
        """Write the resolved recipe, as YAML."""
        _replace(self.recipe, text)

    def rewind(self, step: int) -> None:
        """Drop what was written after `step`: those steps come again. 0 drops everything."""
        for file in (self._metrics, self._validation, self._skipped):
            records = _complete_lines(file) if step else []
            kept = [record for record in records if record["step"] <= step]
            if file.exists() or file is self._skipped:
                _replace(file, "".join(_line(record) for record in kept))
        for file in self._rollouts.glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()
        (self.folder / "summary.json").unlink(missing_ok=True)

    def list_bad_lines(self, step: int, bad_lines: Iterable[Mapping[str, Any]]) -> None:
        """List lines of the annotations that gave no sample, each once however often a run starts.

        A line that became bad, or moved, since the run was last started is listed with that step.
        """
        listed = {record["reason"] for record in _complete_lines(self._skipped)}
        with self._skipped.open("a") as file:
            for record in bad_lines:
                if record["reason"] not in listed:
                    file.write(_line({"step": step, **record}))
                    listed.add(record["reason"])

    def append_step(
        self,
        step: int,
        metrics: Mapping[str, Any],
        rows: Iterable[Mapping[str, Any]],
        skipped: Iterable[Mapping[str, Any]],
    ) -> None:
        """Write one optimizer step: completions, samples left out, and last its metrics."""
        rollouts = self._rollouts / f"step_{step:06d}.jsonl"
        _replace(rollouts, "".join(_line(row) for row in rows))
        with self._skipped.open("a") as file:
            file.writelines(_line({"step": step, **record}) for record in skipped)
        with self._metrics.open("a") as file:
            file.write(_line({"step": step, **metrics}))

    def append_validation(self, step: int, levels: Mapping[str, Any]) -> None:
        """Write one validation."""
        with self._validation.open("a") as file:
            file.write(_line({"step": step, "levels": levels}))

    def validations(self) -> dict[int, dict[str, Any]]:
        """Results by level of each validation so far, by step."""
        return {record["step"]: record["levels"] for record in _complete_lines(self._validation)}

    def skipped_in_training(self) -> list[dict[str, Any]]:
        """`index`, `sample_id` and `reason` of the training samples left out so far."""
        return [
            {key: record[key] for key in ("index", "sample_id", "reason")}
            for record in _complete_lines(self._skipped)
            # Lines of annotations have no index, and validation's samples have a level.
            if record["index"] is not None and "level" not in record
        ]

    def skipped_count(self) -> int:
        """Samples left out so far."""
        return len(_complete_lines(self._skipped))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the summary; its presence says that the run is done."""
        _replace(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
