"""Judges decide whether a completion's reasoning supports its answer."""

import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from nemo_care.data.samples import Sample
from nemo_care.groups.group import Group
from nemo_care.objective.text import extract_answer, parse_completion
from nemo_care.ranks.process_groups import Ranks


@dataclass(frozen=True)
class Verdict:
    """A judge's decision on one completion.

    `consistent` is None if it can't decide. `details` explain the decision, as JSON values for
    columns of the completion's row.
    """

    consistent: bool | None
    details: Mapping[str, Any] = field(default_factory=dict)


class Judge(Protocol):
    """Judges completions, batch by batch; a verdict can arrive while the next batch is
    generated."""

    def judge(self, groups: Sequence[Group]) -> list[Future[Verdict]]:
        """Return one verdict per group, on its only completion.

        All ranks of the model replica call it with equal groups; the leader's verdicts count.
        """
        ...

    def close(self) -> None:
        """Release resources, if there are any; no judging is possible afterwards."""
        return


def known(verdict: Verdict) -> Future[Verdict]:
    """Return a verdict that is already available."""
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future


class NoJudge(Judge):
    """Returns verdicts without a decision."""

    def judge(self, groups: Sequence[Group]) -> list[Future[Verdict]]:
        """Return verdicts without a decision."""
        return [known(Verdict(None)) for _ in groups]


class RuleJudge(Judge):
    """Decides by the option that the reasoning names last (see `rule_verdict`)."""

    def judge(self, groups: Sequence[Group]) -> list[Future[Verdict]]:
        """Return verdicts of the rule, at once."""
        return [
            known(rule_verdict(group.completions[0].text, group.prompt.sample)) for group in groups
        ]


class AnswersQuestions(Protocol):
    """A judge of one completion at a time, such as a language model."""

    def submit(self, sample: Sample, completion: str) -> Future[Verdict]:
        """Submit a completion; the verdict comes later."""
        ...

    def close(self) -> None:
        """Release threads and files."""
        ...


class LeaderJudge(Judge):
    """Uses a judge on each replica's leader only, so that no request is repeated."""

    def __init__(self, judge: AnswersQuestions | None, ranks: Ranks) -> None:
        """Use `judge`, which is needed on the leader only."""
        assert (judge is not None) == ranks.is_model_leader
        self._judge = judge

    def judge(self, groups: Sequence[Group]) -> list[Future[Verdict]]:
        """Submit to the leader's judge; returns nothing on the other ranks."""
        if self._judge is None:
            return [known(Verdict(None)) for _ in groups]
        return [
            self._judge.submit(group.prompt.sample, group.completions[0].text) for group in groups
        ]

    def close(self) -> None:
        """End the leader's threads."""
        if self._judge is not None:
            self._judge.close()


def rule_verdict(completion: str, sample: Sample) -> Verdict:
    """Return the rule's verdict on one completion; it can't decide on open questions."""
    if not sample.options:
        return Verdict(None)
    implied = _implied_by_rule(completion, sample.options)
    consistent = implied is not None and implied == extract_answer(completion)
    return Verdict(consistent, {"implied_answer": implied})


def _implied_by_rule(completion: str, options: Mapping[str, str]) -> str | None:
    """Return the letter of the option whose text the reasoning names last.

    For questions whose options are words that the reasoning names. Only texts count, never a letter
    found in the reasoning. None if the reasoning names no option.
    """
    reasoning = parse_completion(completion).reasoning or ""
    last_named, implied = -1, None
    for letter, text in options.items():
        for match in re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", reasoning):
            if match.start() > last_named:
                last_named, implied = match.start(), letter
    return implied
