"""The judge that asks a reference model: is the answer the likeliest behind that reasoning?

Every option letter takes the given answer's place behind the given reasoning, and the reference
says how likely each of them is there. The reference sees the video too: it says what it believes
given both, not what the reasoning alone implies.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.evaluation.judges import Verdict, known
from nemo_care.objective.text import extract_answer
from nemo_care.rollouts.answer_span import find_answer_tokens
from nemo_care.rollouts.group import Completion, Group

Likelihoods = Callable[[Sequence[Group]], list[torch.Tensor]]
"""Likelihood of each completion's answer under the reference, float32 [G] per group."""


class LikelihoodJudge:
    """Consistent is an answer that no other option exceeds in likelihood."""

    def __init__(self, likelihoods: Likelihoods, tokenizer: ChatTokenizer) -> None:
        """`likelihoods` scores under the reference; all ranks of the replica take part."""
        self.likelihoods = likelihoods
        self.tokenizer = tokenizer

    def judge(self, groups: Sequence[Group]) -> list[Future[Verdict]]:
        """Verdicts with the likelihood of each option, at once.

        Raises:
            RuntimeError: a likelihood is not a number.
        """
        verdicts: list[Verdict | None] = [self._without_scoring(group) for group in groups]
        scored = [group for group, verdict in zip(groups, verdicts, strict=True) if verdict is None]
        # Equal on all ranks of the replica: without anything to score, none of them scores.
        found = iter(self._score(scored) if scored else ())
        return [known(next(found) if verdict is None else verdict) for verdict in verdicts]

    def close(self) -> None:
        """Nothing to give back."""

    def _without_scoring(self, group: Group) -> Verdict | None:
        """The verdict where there is nothing to compare; None where there is."""
        completion, options = group.completions[0], group.prompt.sample.options
        if not options:
            return Verdict(None, {"judge_note": "the question has no options"})
        answer = extract_answer(completion.text)
        if answer is None:
            return Verdict(False, {"judge_note": "there is no answer"})
        if answer not in options:
            return Verdict(False, {"judge_note": "the answer is none of the options"})
        if completion.answer_span is None:
            return Verdict(None, {"judge_note": "no token of the answer was found"})
        return None

    def _score(self, groups: Sequence[Group]) -> list[Verdict]:
        spliced = [
            Group(group.prompt, [self.with_answer(group, letter) for letter in _options(group)])
            for group in groups
        ]
        verdicts = []
        for group, made, means in zip(groups, spliced, self.likelihoods(spliced), strict=True):
            # A likelihood is a mean over tokens. Letters of unequal numbers of tokens (`>B`, but
            # `>` and an unusual letter) can be compared by their whole probability only.
            values = means ** torch.tensor([_answer_length(option) for option in made.completions])
            if bool(values.isnan().any()):
                raise RuntimeError(
                    "the judge's likelihoods are not numbers: look for infinities in the weights "
                    "of its reference, or set model.precision.dtype=fp32"
                )
            options = dict(zip(_options(group), values.tolist(), strict=True))
            answer = extract_answer(group.completions[0].text) or ""
            consistent = options[answer] >= max(options.values())
            verdicts.append(Verdict(consistent, {"option_likelihoods": options}))
        return verdicts

    def with_answer(self, group: Group, letter: str) -> Completion:
        """The group's completion up to its answer, which `letter` takes the place of.

        The given answer keeps the tokens that were sampled. So the reasoning before it has the same
        tokens in front of every option. What shares a token with the given answer (white space, or
        the end of the tag in `>B`) stays beside the letter, and is tokenised with it.
        """
        given = group.completions[0]
        found = find_answer_tokens(self.tokenizer.base, given.token_ids)
        assert found is not None, "_without_scoring"
        answer = given.token_ids[found.start : found.end]
        if letter != found.text:
            text = f"{found.before}{letter}{found.after}"
            answer = torch.tensor(self.tokenizer.encode(text))
        ids = torch.cat([given.token_ids[: found.start], answer])
        return Completion(
            token_ids=ids,
            log_probs=torch.zeros(len(ids)),
            text=self.tokenizer.completion_text(ids.tolist()),
            ended=False,
            answer_span=(found.start, len(ids)),
        )


def _answer_length(completion: Completion) -> int:
    """Tokens of the answer."""
    start, end = completion.answer_span or (0, 0)
    return end - start


def _options(group: Group) -> list[str]:
    return list(group.prompt.sample.options)
