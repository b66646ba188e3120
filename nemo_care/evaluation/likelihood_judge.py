"""Judge with a reference model: is the answer the likeliest one given the reasoning?

Every option letter replaces the given answer after the given reasoning, and the reference computes
its likelihood there. The reference also sees the video: it scores what it believes given both, not
what the reasoning alone implies.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.evaluation.judges import Judge, Verdict, known
from nemo_care.groups.answer_span import find_answer_tokens
from nemo_care.groups.group import Completion, Group
from nemo_care.objective.text import ANSWER_OPEN, extract_answer

Likelihoods = Callable[[Sequence[Group]], list[torch.Tensor]]
"""Likelihood of each completion's answer under the reference, float32 [G] per group."""


class LikelihoodJudge(Judge):
    """Considers an answer consistent if no other option is likelier."""

    def __init__(self, likelihoods: Likelihoods, tokenizer: ChatTokenizer) -> None:
        """Use `likelihoods`, which scores with the reference; all ranks of the replica take
        part."""
        self.likelihoods = likelihoods
        self.tokenizer = tokenizer

    def judge(self, groups: Sequence[Group]) -> list[Future[Verdict]]:
        """Return verdicts with the likelihood of each option, at once.

        Raises:
            RuntimeError: a likelihood is not a number.
        """
        verdicts: list[Verdict | None] = [self._without_scoring(group) for group in groups]
        scored = [group for group, verdict in zip(groups, verdicts, strict=True) if verdict is None]
        # Also if there is nothing to score: another replica may need this one's experts.
        found = iter(self._score(scored))
        return [known(next(found) if verdict is None else verdict) for verdict in verdicts]

    def _without_scoring(self, group: Group) -> Verdict | None:
        """Return the verdict if there is nothing to compare, otherwise None."""
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
        answers = [self.with_options(group) for group in groups]
        spliced = [
            Group(group.prompt, list(by_letter.values()))
            for group, by_letter in zip(groups, answers, strict=True)
        ]
        verdicts = []
        for group, made, means in zip(groups, spliced, self.likelihoods(spliced), strict=True):
            # A likelihood is a mean over tokens. Letters with different numbers of tokens (`>B`,
            # but `>` and `Q`) can only be compared by their total probability.
            values = means ** torch.tensor([_answer_length(option) for option in made.completions])
            if bool(values.isnan().any()):
                raise RuntimeError(
                    "the judge's likelihoods are not numbers: look for infinities in the weights "
                    "of its reference, or set model.precision.dtype=fp32"
                )
            options = dict(zip(_options(group), values.tolist(), strict=True))
            answer = extract_answer(group.completions[0].text) or ""
            consistent = options[answer] >= max(options.values())
            implied = answer if consistent else max(options, key=options.__getitem__)
            details = {"option_likelihoods": options, "implied_answer": implied}
            verdicts.append(Verdict(consistent, details))
        return verdicts

    def with_options(self, group: Group) -> dict[str, Completion]:
        """Return the group's completion up to its answer, with each option letter as the answer.

        The given answer keeps its sampled tokens, and every letter has the same tokens before it. A
        letter is tokenised together with text that can share a token with it: the end of the
        opening tag (`>B`), white space, and the text that the given answer's last token continues
        with. If this does not reproduce the sampled tokens of the given answer, the text is
        continued from the start of the sampled answer instead. The letters' `answer_span`s begin
        where their tokens differ.
        """
        given = group.completions[0]
        ids = given.token_ids.tolist()
        found = find_answer_tokens(self.tokenizer.base, ids)
        assert found is not None, "_without_scoring"
        cut = max((cut for cut in found.cuts if cut < len(ANSWER_OPEN)), default=None)
        begin, before = found.start, found.before
        if cut is not None:
            whole = ANSWER_OPEN[cut:] + found.space
            sampled = ids[found.cuts[cut] : found.end]
            if self.tokenizer.encode(f"{whole}{found.text}{found.after}") == sampled:
                begin, before = found.cuts[cut], whole
        answers = {
            letter: ids[begin : found.end]
            if letter == found.text
            else self.tokenizer.encode(f"{before}{letter}{found.after}")
            for letter in _options(group)
        }
        start = begin + _common_length(list(answers.values()))
        return {
            letter: Completion(
                token_ids=torch.tensor(ids[:begin] + answer),
                log_probs=torch.zeros(begin + len(answer)),
                text=self.tokenizer.completion_text(ids[:begin] + answer),
                ended=False,
                answer_span=(start, begin + len(answer)),
            )
            for letter, answer in answers.items()
        }


def _common_length(answers: Sequence[list[int]]) -> int:
    """Return the length of the common prefix, excluding the last token of the shortest."""
    most = min(len(answer) for answer in answers) - 1
    return next((n for n in range(most) if len({answer[n] for answer in answers}) > 1), most)


def _answer_length(completion: Completion) -> int:
    """Return the number of tokens of the answer."""
    start, end = completion.answer_span or (0, 0)
    return end - start


def _options(group: Group) -> list[str]:
    return list(group.prompt.sample.options)
