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
