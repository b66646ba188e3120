"""The files of an evaluation, in the run directory; written by rank 0 only.

evaluation/settings.json   the settings of the rows
evaluation/LEVEL.jsonl     one line per completion
evaluation/skipped.jsonl   unusable samples and lines of the annotations, with the reason
evaluation.json            results by level, written when all rows are complete
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from nemo_care.data.annotations import Annotations, shown
from nemo_care.errors import InputError
from nemo_care.evaluation.evaluator import Evaluated
from nemo_care.evaluation.results import Results, level_results
from nemo_care.evaluation.rows import MEASURED, ROW, Row
from nemo_care.files.json_lines import (
    Kinds,
    Record,
    append_lines,
    check_record,
    complete_lines,
    read_object,
    replace_file,
    replace_lines,
)

_REMEDY = "choose another exp_manager.explicit_log_dir, or remove the folder evaluation"
_AGAIN = "remove it, and the same command recreates it from the rows"
_RESULT: Kinds = {"count": int, "skipped": int}
_BY_TASK_TYPE: Kinds = {"by_task_type": dict[str, dict]}


class EvaluationFiles:
    """Writes the files of one evaluation, and resumes where a killed one stopped."""

    def __init__(self, run: Path, levels: Mapping[str, Annotations]) -> None:
        """Open the files in `run`, the run directory."""
        self.levels = levels
        self.folder = run / "evaluation"
        self.skipped = self.folder / "skipped.jsonl"
        self._settings = self.folder / "settings.json"
        self._results = run / "evaluation.json"

    def begin(self, settings: Record) -> None:
        """Claim the folder for rows with these settings, which are JSON values by flat key.

        Skipped samples are evaluated again, since they can have been repaired.

        Raises:
            InputError: the folder holds rows with different settings.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._settings.exists():
            _check_settings(self.folder, read_object(self._settings, remedy=_REMEDY), settings)
        elif any(self.folder.glob("*.jsonl")):
            raise InputError(f"{self.folder}: holds rows without settings.json; {_REMEDY}")
        else:
            # Results of an evaluation whose rows were removed.
            self._results.unlink(missing_ok=True)
            replace_file(self._settings, json.dumps(settings, indent=2) + "\n")
        twice = [level for level in self.levels if self._has_rows_twice(level)]
        if self._results.exists() and not twice:
            return
        for level in self.levels:
            replace_lines(self._rows(level), self.rows(level))
        if self._results.exists():
            # They count rows of two evaluations, which older versions allowed here at once.
            self._results.unlink()
            return
        bad = [
            {"level": level, **asdict(item)}
            for level, annotations in self.levels.items()
            for item in annotations.bad
        ]
        replace_lines(self.skipped, bad)

    def results(self) -> dict[str, Results] | None:
        """Return the results by level of a complete evaluation, otherwise None.

        Raises:
            InputError: the file of the results is damaged.
        """
        if not self._results.exists():
            return None
        results = read_object(self._results, remedy=_AGAIN)
        for level, result in results.items():
            where = f"{self._results}: level {shown(level)}"
            check_record(where, result, _RESULT, _BY_TASK_TYPE, remedy=_AGAIN)
        return results

    def rows(self, level: str) -> list[Row]:
        """Return the rows of a level so far, one per sample: the first of its index.

        Raises:
            InputError: a line is damaged.
        """
        rows: dict[int, Row] = {}
        for row in complete_lines(self._rows(level), ROW, MEASURED):
            rows.setdefault(row["index"], row)
        return list(rows.values())

    def append(self, level: str, batch: Evaluated) -> None:
        """Write a batch: skipped samples, and rows."""
        append_lines(self.skipped, [{"level": level, **asdict(item)} for item in batch.skipped])
        append_lines(self._rows(level), batch.rows)

    def replace(self, level: str, rows: Sequence[Row]) -> None:
        """Replace the rows of a level."""
        replace_lines(self._rows(level), rows)

    def finish(self, *, judged: bool) -> dict[str, Results]:
        """Write the results, computed from the rows; `judged` as in `level_results`."""
        # Each once, whatever the reason: lines of the annotations have no index but an id.
        left_out = {
            (record["level"], record["index"], record["sample_id"])
            for record in complete_lines(self.skipped, {"level": str})
        }
        skipped = [level for level, _, _ in left_out]
        results = {
            level: level_results(self.rows(level), skipped=skipped.count(level), judged=judged)
            for level in self.levels
        }
        replace_file(self._results, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        return results

    def _has_rows_twice(self, level: str) -> bool:
        return len(complete_lines(self._rows(level))) > len(self.rows(level))

    def _rows(self, level: str) -> Path:
        return self.folder / f"{level}.jsonl"


def check_level_names(levels: Sequence[str]) -> None:
    """Reject level names that are not valid as file names.

    Raises:
        InputError: names the level.
    """
    for level in levels:
        if not level or "/" in level or level.startswith(".") or level == "skipped":
            raise InputError(
                f"data.validation.annotations: the level {shown(level)} can't name a file of rows; "
                "choose a name without / and without a dot at its beginning, other than skipped"
            )


def _check_settings(folder: Path, old: Record, new: Record) -> None:
    new = json.loads(json.dumps(new))
    changes = [
        f"{key}: {shown(old.get(key))} -> {shown(new.get(key))}"
        for key in dict.fromkeys((*old, *new))
        if old.get(key) != new.get(key)
    ]
    if changes:
        raise InputError(
            f"{folder} holds rows that were made with different settings ({'; '.join(changes)}); "
            f"{_REMEDY}"
        )
