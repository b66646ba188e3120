"""The layout of Video-R1-260k and of general video benchmarks: a JSON array, or lines.

    {"problem_id": 2, "problem": "...", "data_type": "video", "problem_type": "multiple choice",
     "options": ["A. a cup", "B. a knife"], "solution": "<answer>B</answer>", "path": "./dir/x.mp4"}

`path` is relative to the data root. Other fields (`process`, `data_source`, ...) are ignored.
"""

import re

from nemo_care.data.annotations import Record, shown
from nemo_care.data.samples import Sample
from nemo_care.objective.rewards import PROBLEM_TYPES

_OPTION = re.compile(r"\s*\(?([A-Z])[.:)]\s*(.*)", re.DOTALL)


def parse(record: Record, seed: int) -> Sample:
    """Convert a record to a sample; raises InputError for an unusable record."""
    problem_type = record.choice("problem_type", PROBLEM_TYPES)
    data_type = record.choice("data_type", ("video", "image"))
    name = record.text("path")
    options = _options(record)
    return Sample(
        sample_id=record.identifier("problem_id"),
        question=record.text("problem"),
        solution=record.solution("solution", problem_type, options, tagged=True),
        problem_type=problem_type,
        videos=(record.media(name, "video"),) if data_type == "video" else (),
        images=(record.media(name, "image"),) if data_type == "image" else (),
        options=options,
        task_type=record.text("task_type", default=""),
    )


def _options(record: Record) -> dict[str, str]:
    """Return options by letter; none for an open question."""
    options: dict[str, str] = {}
    for entry in record.texts("options") if record.has("options") else []:
        match = _OPTION.fullmatch(entry)
        if match is None or match[1] in options:
            raise record.error(
                f'"options" must be a list such as ["A. ...", "B. ..."], not {shown(entry)}'
            )
        options[match[1]] = match[2].strip()
    return options
