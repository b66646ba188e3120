"""The layout of Video-R1-260k and of general video benchmarks: a JSON array, or lines.

    {"problem_id": 2, "problem": "...", "data_type": "video", "problem_type": "multiple choice",
     "options": ["A. a cup", "B. a knife"], "solution": "<answer>B</answer>", "path": "./dir/x.mp4"}

`path` is relative to the data root. Other fields (`process`, `data_source`, ...) are ignored.
"""

import re
from pathlib import Path

from nemo_care.data.annotations import Annotations, Record, read_annotations, shown
from nemo_care.data.samples import Sample
from nemo_care.data.solutions import Accuracy
from nemo_care.objective.rewards import PROBLEM_TYPES, accuracy_reward

_OPTION = re.compile(r"\s*\(?([A-Z])[.:)]\s*(.*)", re.DOTALL)


def read_video_r1(
    root: str | Path, annotations: str, *, accuracy: Accuracy = accuracy_reward
) -> Annotations:
    """Read the samples and the bad entries of `root/annotations`.

    Raises:
        InputError: see `read_annotations`.
    """
    return read_annotations(root, annotations, parse_video_r1, accuracy=accuracy)


def parse_video_r1(record: Record) -> Sample:
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
