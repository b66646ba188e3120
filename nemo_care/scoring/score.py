"""Score completions under a model: answer likelihoods, and all log-probabilities on request."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_care.models.pipeline import forward_only
from nemo_care.models.qwen2_5_vl import Qwen25VL
from nemo_care.objective.consistency import answer_likelihood
from nemo_care.parallel.cpu_compat import compute_device
from nemo_care.parallel.process_groups import Ranks
from nemo_care.rollouts.group import Group
from nemo_care.rollouts.sequences import BatchLayout, sequence_batches


@dataclass(frozen=True)
class GroupScores:
    """What a model says of one group.

    `answer_likelihood` float32 [G], NaN without an answer, not clipped. `log_probs` float32 [C_i]
    per completion.
    """

    answer_likelihood: torch.Tensor
    log_probs: list[torch.Tensor]


class Scorer:
    """Teacher-forced scoring of groups under one model; all ranks of the replica take part."""

    def __init__(self, model: Qwen25VL, ranks: Ranks, layout: BatchLayout) -> None:
        """`layout` says how groups become micro-batches."""
        self.model = model
        self.ranks = ranks
        self.layout = layout

    def score(self, groups: Sequence[Group]) -> list[GroupScores]:
        """Scores of each group, equal on all ranks of the model replica."""
        batches = sequence_batches(groups, self.layout)
        results = forward_only(
            self.model,
            batches,
            inputs_of=lambda batch: batch.inputs,
            result_of=lambda logits, batch: batch.completion_log_probs(
                logits, self.model.vocab_size
            ),
        )
        scores: list[GroupScores] = []
        for number, batch in enumerate(batches):
            log_probs = (
                results[number]
                if self.ranks.is_last_stage
                else torch.zeros(batch.mask.shape, device=compute_device())
            )
            self.ranks.broadcast_from_last_stage(log_probs)
            likelihood = answer_likelihood(log_probs, batch.answer_mask).cpu()
            sizes = [group.size for group in batch.groups]
            for part, vectors in zip(
                likelihood.split(sizes), batch.unpadded(log_probs), strict=True
            ):
                scores.append(GroupScores(part, vectors))
        return scores
