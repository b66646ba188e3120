"""Judges say whether a completion's reasoning supports the answer it gives."""

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
    """What a judge says of one completion.

    `consistent` is None where it can't say. `details` are what it goes by, as JSON values: columns
    of the completion's row beside the verdict.
    """

    consistent: bool | None
    details: Mapping[str, Any] = field(default_factory=dict)


class Judge(Protocol):
    """Judges completions, batch by batch; a verdict may come while the next batch is generated."""

    def judge(self, groups: Sequence[Group]) -> list[Future[Verdict]]:
        """One verdict per group, on its only completion.

        All ranks of the model replica call it with equal groups; the leader's verdicts count.
        """
        ...

    def close(self) -> None:
        """Give back what it holds; nothing is judged afterwards."""
        ...


def known(verdict: Verdict) -> Future[Verdict]:
    """A verdict that is there already."""
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future


class NoJudge:
    """Says nothing."""

    def judge(self, groups: Sequence[Group]) -> list[Future[Verdict]]:
        """Verdicts that say nothing."""
        return [known(Verdict(None)) for _ in groups]

    def close(self) -> None:
        """Nothing to give back."""


class RuleJudge:
    """Goes by the option that the reasoning names last (see `rule_verdict`)."""

    def judge(self, groups: Sequence[Group]) -> list[Future[Verdict]]:
        """Verdicts of the rule, at once."""
        return [
            known(rule_verdict(group.completions[0].text, group.prompt.sample)) for group in groups
        ]

    def close(self) -> None:
        """Nothing to give back."""


class AnswersQuestions(Protocol):
    """What is asked about one completion at a time, such as a language model."""

    def submit(self, sample: Sample, completion: str) -> Future[Verdict]:
        """Ask; the verdict comes later."""
        ...

    def close(self) -> None:
        """Give back threads and files."""
        ...


class LeaderJudge:
    """Lets each replica's leader ask, so that nothing is asked twice."""

    def __init__(self, judge: AnswersQuestions | None, ranks: Ranks) -> None:
        """`judge` is needed on the leader only."""
        assert (judge is not None) == ranks.is_model_leader
        self._judge = judge

    def judge(self, groups: Sequence[Group]) -> list[Future[Verdict]]:
        """The leader's questions; nothing on the other ranks."""
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
    """What the rule says of one completion; open questions it can't judge."""
    if not sample.options:
        return Verdict(None)
    implied = implied_by_rule(completion, sample.options)
    return Verdict(rule_judge(completion, sample.options), {"implied_answer": implied})


def rule_judge(completion: str, options: Mapping[str, str]) -> bool:
    """Whether the answered letter is the one that the reasoning implies by the rule."""
    implied = implied_by_rule(completion, options)
    return implied is not None and implied == extract_answer(completion)


def implied_by_rule(completion: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option whose text the reasoning names last.

    For questions whose options are words that the reasoning names. It goes by the text, never by a
    letter found in the reasoning. None where the reasoning names no option.
    """
    reasoning = parse_completion(completion).reasoning or ""
    last_named, implied = -1, None
    for letter, text in options.items():
        for match in re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", reasoning):
            if match.start() > last_named:
                last_named, implied = match.start(), letter
    return implied
