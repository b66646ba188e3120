"""Judges say whether a completion's reasoning supports the answer it gives."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_care.data.samples import Sample
from nemo_care.objective.text import parse_completion


@dataclass(frozen=True)
class Verdict:
    """What a judge says of one completion.

    `consistent` is None where it can't say. `details` are what it goes by, as JSON values: columns
    of the completion's row beside the verdict.
    """

    consistent: bool | None
    details: Mapping[str, Any] = field(default_factory=dict)


def rule_judge(completion: str, options: Mapping[str, str]) -> bool:
    """For questions whose options are words that the reasoning names.

    The option text named last in the reasoning must belong to the answered letter. It goes by the
    text, never by a letter found in the reasoning. A reasoning that names no option supports
    nothing.
    """
    parsed = parse_completion(completion)
    if parsed.reasoning is None or parsed.answer is None:
        return False
    last_named, supported = -1, None
    for letter, text in options.items():
        for match in re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", parsed.reasoning):
            if match.start() > last_named:
                last_named, supported = match.start(), letter
    return supported is not None and supported == parsed.answer.strip()


def judged_consistent(judge: str, completion: str, sample: Sample) -> bool | None:
    """What the recipe's judge ("rule" or "none") says of a completion; None where it can't say."""
    if judge == "none" or not sample.options:
        return None
    return rule_judge(completion, sample.options)
