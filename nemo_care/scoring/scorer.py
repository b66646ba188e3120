"""The scoring pass: completions under a model, without gradients.

A group's vision tower and prompt run once, the output layer only for the requested tokens. The
caller's function reduces the log-probabilities on the last pipeline stage, micro-batch by
micro-batch. One small broadcast then sends the results of one rank to the others of its replica.
"""

from collections.abc import Callable, Sequence

import torch

from nemo_care.groups.batch import GroupBatch
from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Group
from nemo_care.megatron.cpu import compute_device
from nemo_care.models.pipeline import forward_only
from nemo_care.models.precision import computing
from nemo_care.models.video_language_model import VideoLanguageModel
from nemo_care.objective.consistency import answer_likelihood
from nemo_care.ranks.process_groups import Ranks

Table = torch.Tensor
"""Results of one group: float32 [K, G], a column per completion."""


def per_group(batch: GroupBatch, values: torch.Tensor) -> list[Table]:
    """Return a table of one row for each group from the values [N] of its completions."""
    return list(values[None].split([group.size for group in batch.groups], dim=1))


class Scorer:
    """Teacher-forced scoring of groups under one model; all ranks of the replica take part."""

    def __init__(
        self, model: VideoLanguageModel, ranks: Ranks, layout: BatchLayout, *, fp8: bool = False
    ) -> None:
        """Use `layout` to make micro-batches of groups; several fill the pipeline.

        `fp8`: score in 8 bits if the model's configuration supports them.
        """
        self.fp8 = fp8
        self.model = model
        self.ranks = ranks
        self.layout = layout

    def answer_likelihoods(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        """Return the likelihood of each completion's answer, not clipped, float32 [G] per group.

        NaN without an answer.
        """

        def likelihood(batch: GroupBatch, log_probs: torch.Tensor) -> list[Table]:
            return per_group(batch, answer_likelihood(log_probs, batch.answer_mask))

        return [table[0] for table in self.score(groups, likelihood, rows=1)]

    def pair_likelihoods(self, groups: Sequence[Group]) -> list[torch.Tensor]:
        """Return the likelihood of each answer given each reasoning, float32 [G, G] per group.

        Row i, column j: exp of the mean log-probability of the tokens of answer i after the
        reasoning of completion j; NaN if either has no answer.

        Raises:
            ValueError: the layout does not share the prompt.
        """
        return self._tables(
            self.layout.batches(groups, answer_pairs=True),
            lambda hidden, batch: batch.pair_likelihoods(self.model, hidden),
            [(group.size, group.size) for group in groups],
        )

    def score(
        self,
        groups: Sequence[Group],
        table_of: Callable[[GroupBatch, torch.Tensor], list[Table]],
        *,
        rows: int,
        all_tokens: bool = False,
        answer_pairs: bool = False,
    ) -> list[Table]:
        """Return one table per group, on the CPU, equal on all ranks of the model replica.

        Replicas that share experts call it equally often, also without groups.

        Args:
            groups: the groups to score.
            table_of: called on the last stage with a micro-batch and the log-probabilities float32
                [N, C] of its completions' answer tokens (zero elsewhere); returns a table [rows, G]
                per group.
            rows: K of those tables.
            all_tokens: include log-probabilities of all completion tokens, not only the answers'.
            answer_pairs: also score every answer given every reasoning (see `pair_likelihoods`);
                each table then has G more rows with the results.

        Raises:
            ValueError: answer pairs in a layout that does not share the prompt.
        """

        def result(hidden: torch.Tensor, batch: GroupBatch) -> list[Table]:
            asked = batch.asked_of_reference(all_tokens=all_tokens)
            tables = table_of(batch, batch.log_probs(self.model, hidden, asked))
            if not answer_pairs:
                return tables
            pairs = batch.pair_likelihoods(self.model, hidden)
            return [torch.cat(parts) for parts in zip(tables, pairs, strict=True)]

        shapes = [(rows + answer_pairs * group.size, group.size) for group in groups]
        batches = self.layout.batches(groups, answer_pairs=answer_pairs)
        return self._tables(batches, result, shapes)

    def _tables(
        self,
        batches: Sequence[GroupBatch],
        result: Callable[[torch.Tensor, GroupBatch], list[Table]],
        shapes: Sequence[tuple[int, int]],
    ) -> list[Table]:
        """Run the pass; `shapes` of the groups' tables are used by the other stages."""
        with computing(self.model.config, fp8=self.fp8):
            results = forward_only(
                self.model,
                batches,
                inputs_of=lambda batch: batch.rows.inputs(self.model),
                result_of=result,
            )
        if not shapes:
            return []
        counts = [height * width for height, width in shapes]
        flat = (
            torch.cat([table.reshape(-1) for tables in results for table in tables])
            if self.ranks.is_last_stage
            else torch.zeros(sum(counts), device=compute_device())
        )
        parts = self.ranks.broadcast_from_loss_leader(flat).cpu().split(counts)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
