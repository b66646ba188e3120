"""Measures of consistency besides the judge: columns of each completion's row.

They apply to any multiple-choice question. docs/evaluation.md compares them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from nemo_care.data.option_shuffle import with_shuffled_options
from nemo_care.data.prompts import Prompt, PromptBuilder, PromptTooLong
from nemo_care.evaluation.judges import Judge
from nemo_care.evaluation.likelihood_judge import LikelihoodJudge
from nemo_care.evaluation.rows import Row
from nemo_care.groups.group import Group
from nemo_care.objective.consistency import peer_dependence
from nemo_care.objective.text import extract_answer
from nemo_care.rollouts.generator import Generator, Sampling
from nemo_care.scoring.scorer import Scorer

Measure = Callable[[Sequence[Group]], list[Row]]
"""Columns for groups of one completion; all ranks of the replica call it alike."""


@dataclass(frozen=True)
class FurtherJudge:
    """The verdicts of an immediate judge, in a separate column."""

    name: str
    judge: Judge

    def __call__(self, groups: Sequence[Group]) -> list[Row]:
        """Return `consistent_NAME` of each completion."""
        verdicts = self.judge.judge(groups)
        return [{f"consistent_{self.name}": verdict.result().consistent} for verdict in verdicts]


@dataclass(frozen=True)
class OptionShuffle:
    """Whether the answer follows its option's text when the options change their letters.

    After ACRE (arXiv 2510.10104), which gives the model its own reasoning again with shuffled
    options, and compares its second answer with the first. Here the second answer is not generated:
    it is the letter that the model finds likeliest given the same reasoning.
    """

    policy: LikelihoodJudge
    prompts: PromptBuilder

    def __call__(self, groups: Sequence[Group]) -> list[Row]:
        """Return `shuffle_follows` of each completion; None if its answer is none of the options.

        Also None if the prompt does not show the options, or has no room for their new order.
        """
        shuffled = [self._shuffled(group) for group in groups]
        verdicts = iter(self.policy.judge([group for group in shuffled if group is not None]))
        rows: list[Row] = []
        for group, made in zip(groups, shuffled, strict=True):
            likelihoods = None
            if made is not None:
                likelihoods = next(verdicts).result().details.get("option_likelihoods")
            if made is None or likelihoods is None:
                rows.append({"shuffle_follows": None})
                continue
            before, after = group.prompt.sample.options, made.prompt.sample.options
            first = extract_answer(group.completions[0].text) or ""
            second = max(likelihoods, key=likelihoods.__getitem__)
            rows.append({"shuffle_follows": before[first] == after[second]})
        return rows

    def _shuffled(self, group: Group) -> Group | None:
        prompt = group.prompt
        if len(prompt.sample.options) < 2:
            return None
        try:
            made: Prompt = self.prompts.with_text_of(prompt, with_shuffled_options(prompt.sample))
        except PromptTooLong:
            return None
        if torch.equal(made.token_ids, prompt.token_ids):
            return None
        return Group(made, group.completions)


@dataclass(frozen=True)
class PeerProbe:
    """Whether answers depend on their own reasoning, measured on the model's own completions.

    Further completions of each prompt are sampled. If two of them have different answers, the model
    scores how likely each answer is given its own reasoning and given the other's.
    """

    generator: Generator
    scorer: Scorer
    sampling: Sampling

    def __call__(self, groups: Sequence[Group]) -> list[Row]:
        """Return `peer_probe` of each prompt (see `peer_dependence`); None if all answers agree.

        Also None without options.
        """
        prompts = [group.prompt for group in groups if group.prompt.sample.options]
        values = iter(self._values(prompts))
        return [
            {"peer_probe": next(values) if group.prompt.sample.options else None}
            for group in groups
        ]

    def _values(self, prompts: Sequence[Prompt]) -> list[float | None]:
        peers = self.generator.generate(prompts, self.sampling)
        return [
            peer_dependence(pairs, [extract_answer(c.text) or None for c in group.completions])
            for group, pairs in zip(peers, self.scorer.pair_likelihoods(peers), strict=True)
        ]
