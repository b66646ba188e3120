"""One question of a data set, as text and paths: not decoded or tokenized yet."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """A question about videos and images, with its solution.

    `options` maps an option letter to its text and is empty for open questions.
    `forced_reasoning` and `forced_answer` are for the forced-reasoning probe: a reasoning to insert
    into the model's completion, and the option letter it implies. They are empty without a probe.
    `task_type` is the question's type of task, for results by type; empty if the annotations do not
    have one.
    """

    sample_id: str
    question: str
    solution: str
    problem_type: str = "multiple choice"
    videos: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    forced_reasoning: str = ""
    forced_answer: str = ""
    task_type: str = ""


@dataclass(frozen=True)
class Skipped:
    """A sample that was skipped, and the reason.

    `index` is its place in the training stream or the validation file. A line of an annotations
    file that gave no sample has no index, and its `sample_id` is FILE:LINE.
    """

    index: int | None
    sample_id: str
    reason: str


def too_many_skipped(count: float, total: float, max_fraction: float) -> bool:
    """Whether `count` unusable samples make a data set of `total` samples unusable.

    `max_fraction` is data.max_skipped_fraction; a data set without any usable sample always is.
    """
    return count == total or count > max_fraction * total
