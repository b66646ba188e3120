"""One question of a data set, as text and paths: nothing is decoded or tokenised yet."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Sample:
    """A question about videos and images, with its solution.

    `options` maps an option letter to its text and is empty for open questions.
    `forced_reasoning` and `forced_answer` belong to the forced-reasoning probe: a reasoning to put
    in the model's mouth, and the option letter it implies. They are empty where there is no probe.
    `task_type` says what kind of task the question belongs to, for results by kind; empty where the
    annotations do not say.
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
    """A sample that was left out, and why.

    `index` is its place in the training stream or the validation file. A line of an annotations
    file that gave no sample has none, and its `sample_id` is FILE:LINE.
    """

    index: int | None
    sample_id: str
    reason: str


def too_many_skipped(count: float, total: float, max_fraction: float) -> bool:
    """Whether a data set of `total` samples is unusable because `count` of them are.

    `max_fraction` is data.max_skipped_fraction; a data set without any usable sample never passes.
    """
    return count == total or count > max_fraction * total
