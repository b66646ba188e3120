"""The raw results of a study's runs, one line each, with all that tables and figures show."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_care.errors import InputError
from nemo_care.experiments.config import Study
from nemo_care.experiments.training_runs import TrainingRun
from nemo_care.files.json_lines import Kinds, complete_lines
from nemo_care.reporting.tables import known
from nemo_care.runs.metrics import ACCURACY, ANSWER_LIKELIHOOD, CONSISTENCY, STEP_TIME
from nemo_care.runs.reader import Levels, RunRecord, number, read_run

RESULTS = "results.jsonl"
# The metrics that are drawn over the steps.
CURVES = (CONSISTENCY, ACCURACY, ANSWER_LIKELIHOOD)
# Enough for a line three inches long.
_POINTS = 50
_DIGITS = 5

_RESULT: Kinds = {
    "variant": str,
    "seed": int,
    "overrides": list[str],
    "steps": int | None,
    "wall_seconds": float | None,
    "seconds_per_step": float | None,
    "start": dict[str, dict] | None,
    "end": dict[str, dict] | None,
    "curves": dict[str, list[float | None]],
    "data": str | None,
}


@dataclass(frozen=True)
class Result:
    """A finished run."""

    variant: str
    seed: int
    overrides: list[str]
    steps: int | None
    wall_seconds: float | None
    """Of its last start only."""
    seconds_per_step: float | None
    """Median: the first steps include warm-up."""
    start: Levels | None
    """Validation before the first step."""
    end: Levels | None
    curves: Mapping[str, Sequence[float | None]]
    """`step`, and the mean of each of `CURVES` over the steps up to it."""
    data: str | None
    """Kind of the training data."""


def read_result(variant: str, run: TrainingRun) -> Result:
    """Read the results of a finished run from its directory."""
    import pandas as pd

    record = read_run(run.folder)
    summary = record.summary or {}
    step = pd.Series(record.series(STEP_TIME), dtype=float).median()
    wall = number(summary.get("wall_seconds"))
    return Result(
        variant=variant,
        seed=run.seed,
        overrides=list(run.overrides),
        steps=summary.get("steps"),
        wall_seconds=None if math.isnan(wall) else round(wall, 3),
        seconds_per_step=None if math.isnan(step) else round(step, _DIGITS),
        start=record.start,
        end=record.end,
        curves=_thinned(record),
        data=record.setting("data.train.kind"),
    )


def _thinned(record: RunRecord) -> dict[str, list[float | None]]:
    """Reduce each curve to at most `_POINTS` means of neighbouring steps."""
    import pandas as pd

    steps = pd.Series(record.steps(), dtype=int)
    frame = pd.DataFrame({key: record.series(key) for key in CURVES}, dtype=float)
    part = steps.index // max(1, math.ceil(len(steps) / _POINTS))
    means = frame.groupby(part).mean().round(_DIGITS).dropna(axis="columns", how="all")
    curves = {key: [known(value) for value in means[key]] for key in means}
    return {"step": steps.groupby(part).last().tolist(), **curves}


def read_results(file: Path) -> list[Result]:
    """Return the results in a results file.

    Raises:
        InputError: the file does not exist, or one of its lines is damaged.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; give the results.jsonl of a study")
    return [Result(**values) for values in complete_lines(file, _RESULT, more=_wrong_result)]


def _wrong_result(values: Mapping[str, Any]) -> str:
    unknown = sorted(values.keys() - _RESULT.keys())
    if unknown:
        return f'unknown key "{unknown[0]}"'
    curves = values["curves"]
    if "step" not in curves:
        return 'its "curves" lack "step"'
    return "" if len({*map(len, curves.values())}) == 1 else 'its "curves" differ in length'


def check_results(study: Study, results: Sequence[Result], file: Path) -> None:
    """Reject results of a different study, whose runs these tables would not name.

    Raises:
        InputError: a run that is not in the study, has different overrides, or occurs twice.
    """
    met = set()
    for one in results:
        run = f"{file}: seed {one.seed} of {one.variant}"
        if one.variant not in study.variants or one.seed not in study.seeds_of(one.variant):
            raise InputError(f"{run} is not in the study; remove the line or add the run")
        if one.overrides != list(study.overrides_of(one.variant)):
            raise InputError(f"{run} was made with different overrides: {' '.join(one.overrides)}")
        if (one.variant, one.seed) in met:
            raise InputError(f"{run} occurs twice; remove one of the lines")
        met.add((one.variant, one.seed))
