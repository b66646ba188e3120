"""Completions of given tokens, and a judge's verdicts on groups."""

import torch

from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.groups.answer_span import answer_token_span
from nemo_care.groups.group import Completion


class SimplePrompt:
    """A prompt of which only the sample is used."""

    def __init__(self, sample):
        self.sample = sample


def completion_of(tokenizer: ChatTokenizer, ids: list[int]) -> Completion:
    return Completion(
        token_ids=torch.tensor(ids),
        log_probs=torch.zeros(len(ids)),
        text=tokenizer.completion_text(ids),
        ended=True,
        answer_span=answer_token_span(tokenizer.base, ids),
    )


def verdicts_of(judge, groups):
    return [future.result(timeout=0) for future in judge.judge(groups)]
