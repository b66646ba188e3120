"""The forced-reasoning probe: does the answer follow from the reasoning?

It forces a wrong reasoning on the model and measures the probability of the letter that this
reasoning implies, and of the true letter. This shows whether answers are *caused* by the reasoning,
which consistency alone does not show.
"""

from collections.abc import Sequence

import torch

from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.evaluation.rows import Row
from nemo_care.groups.answer_span import answer_token_span
from nemo_care.groups.group import Completion, Group
from nemo_care.scoring.scorer import Scorer

_FORCED = "<think> {reasoning} </think> <answer> {answer} </answer>"


class ForcedReasoningProbe:
    """Probes the model of a scorer."""

    def __init__(self, scorer: Scorer, tokenizer: ChatTokenizer) -> None:
        """Use `scorer`, which computes the probabilities of the model to probe."""
        self.scorer = scorer
        self.tokenizer = tokenizer

    def __call__(self, groups: Sequence[Group]) -> list[Row]:
        """Return per prompt `probe_implied` and `probe_true`, None if the sample has no probe.

        Only the groups' prompts are used; all ranks of the model replica call it alike.
        """
        prompts = [group.prompt for group in groups]
        probed = [prompt for prompt in prompts if prompt.sample.forced_reasoning]
        forced = [
            Group(
                prompt,
                [
                    self._forced(prompt.sample.forced_reasoning, answer)
                    for answer in (prompt.sample.forced_answer, prompt.sample.solution)
                ],
            )
            for prompt in probed
        ]
        likelihoods = iter(self.scorer.answer_likelihoods(forced))
        values: list[Row] = []
        for prompt in prompts:
            implied, true = (
                next(likelihoods).tolist() if prompt.sample.forced_reasoning else (None, None)
            )
            values.append({"probe_implied": implied, "probe_true": true})
        return values

    def _forced(self, reasoning: str, answer: str) -> Completion:
        text = _FORCED.format(reasoning=reasoning, answer=answer)
        ids = self.tokenizer.encode(text)
        return Completion(
            token_ids=torch.tensor(ids),
            log_probs=torch.zeros(len(ids)),
            text=text,
            ended=False,
            answer_span=answer_token_span(self.tokenizer.base, ids),
        )
