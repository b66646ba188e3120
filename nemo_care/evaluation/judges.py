"""Judges decide whether a completion's reasoning supports its answer."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch

from nemo_care.data.samples import Sample
from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.files.json_lines import Record
from nemo_care.groups.group import Group
from nemo_care.objective.text import extract_answer, parse_completion
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.evaluation import JUDGES
from nemo_care.recipe.schema import Recipe

Likelihoods = Callable[[Sequence[Group]], list[torch.Tensor]]
"""Likelihood of each completion's answer under the reference, float32 [G] per group."""


@dataclass(frozen=True)
class Verdict:
    """A judge's decision on one completion.

    `consistent` is None if it can't decide. `details` explain the decision, as JSON values for
    columns of the completion's row.
    """

    consistent: bool | None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """What a judge can be built of.

    `likelihoods` scores with the reference of the likelihood judge and is None without one;
    `folder` is the run directory.
    """

    recipe: Recipe
    ranks: Ranks
    tokenizer: ChatTokenizer
    likelihoods: Likelihoods | None
    folder: Path


class Judge(ABC):
    """Judges completions, batch by batch; a verdict can arrive while the next batch is
    generated."""

    @classmethod
    def build(cls, evaluation: Evaluation) -> "Judge":
        """Return the judge of a recipe; collective over the ranks of the replica."""
        return cls()

    @classmethod
    def settings(cls, recipe: Recipe) -> Record:
        """Return what its verdicts depend on: a resumed evaluation must have the same."""
        return {}

    @abstractmethod
    def judge(self, groups: Sequence[Group]) -> list[Future[Verdict]]:
        """Return one verdict per group, on its only completion.

        All ranks of the model replica call it with equal groups; the leader's verdicts count.
        """

    def close(self) -> None:
        """Release resources, if there are any; no judging is possible afterwards."""
        return


def judge_class(name: str) -> type[Judge]:
    """Return the class of a judge that a recipe can name."""
    return resolve_name(JUDGES[name])


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
