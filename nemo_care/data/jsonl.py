"""The project's own data layout: one JSON object per line.

    {"id": "42", "question": "...", "solution": "B", "problem_type": "multiple choice",
     "videos": ["videos/42.mp4"], "images": [], "options": {"A": "left", "B": "right"}}

`question` and `solution` are required. Paths are relative to the data root and must stay in it.
`forced_reasoning` and `forced_answer` are for the forced-reasoning probe, `task_type` is for
results by type of task (see Sample).
"""

from nemo_care.data.annotations import Record, shown
from nemo_care.data.samples import Sample
from nemo_care.objective.rewards import PROBLEM_TYPES

_OPTIONAL_TEXTS = ("forced_reasoning", "forced_answer", "task_type")
_KEYS = {
    *("id", "question", "solution", "problem_type", "videos", "images", "options"),
    *_OPTIONAL_TEXTS,
}


def parse(record: Record, seed: int) -> Sample:
    """Convert a record to a sample; raises InputError for an unusable record."""
    unknown = sorted(set(record.content) - _KEYS)
    if unknown:
        known = ", ".join(sorted(_KEYS))
        raise record.error(f"unknown field {shown(unknown[0])}; known: {known}")
    line_number = record.where.rpartition(":")[2]
    problem_type = record.choice("problem_type", PROBLEM_TYPES, default="multiple choice")
    options = record.mapping("options")
    return Sample(
        sample_id=record.text("id", default=line_number),
        question=record.text("question"),
        solution=record.solution("solution", problem_type, options),
        problem_type=problem_type,
        videos=tuple(record.media(name, "video") for name in record.texts("videos", default=[])),
        images=tuple(record.media(name, "image") for name in record.texts("images", default=[])),
        options=options,
        **{key: record.text(key, default="") for key in _OPTIONAL_TEXTS},
    )
