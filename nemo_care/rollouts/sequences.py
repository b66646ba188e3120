"""Groups laid out for the model: one sequence [prompt | completion] per completion.

This is the simple layout, in which each of the G sequences holds the whole prompt. Scoring and
update only see `SequenceBatch`, so that another layout can take its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_care.models.log_probs import token_log_probs
from nemo_care.models.qwen2_5_vl import ModelInputs
from nemo_care.parallel.cpu_compat import compute_device
from nemo_care.rollouts.group import Group


@dataclass(frozen=True)
class BatchLayout:
    """How groups become micro-batches.

    `groups_per_batch` groups make one; sequences are padded with `pad_id` to a multiple of
    `multiple` tokens, which sequence parallelism divides by the tensor-parallel size.
    """

    groups_per_batch: int
    pad_id: int
    multiple: int = 1


@dataclass
class SequenceBatch:
    """The N completions of some groups as right-padded sequences of S tokens.

    `mask` bool [N, C] is True at completion tokens, `answer_mask` bool [N, C] at answer tokens.
    `columns` of the sequences hold the completions' tokens and what predicts them; `index` [N, C]
    says at which of those columns each token is predicted.
    """

    groups: Sequence[Group]
    inputs: ModelInputs
    mask: torch.Tensor
    answer_mask: torch.Tensor
    columns: slice
    index: torch.Tensor

    def completion_log_probs(self, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Log-probabilities of the completions' tokens, float32 [N, C] (zero outside the mask).

        `logits` are [N, S, V_padded / TP]; differentiable.
        """
        # Prompt columns are cut off before anything is computed in float32.
        log_probs = token_log_probs(
            logits[:, self.columns], self.inputs.token_ids[:, self.columns], vocab_size
        )
        return torch.where(self.mask, log_probs.gather(1, self.index), 0.0)

    def advantages(self) -> torch.Tensor:
        """Advantage of each completion, float32 [N]."""
        return torch.cat([group.advantage for group in self.groups]).to(self.mask.device)

    def padded(self, per_group: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
        """Per-completion vectors [C_i] of each group as one float32 [N, C], zero-padded."""
        out = torch.zeros(self.mask.shape)
        rows = (vector for vectors in per_group for vector in vectors)
        for row, vector in enumerate(rows):
            out[row, : len(vector)] = vector
        return out.to(self.mask.device)

    def unpadded(self, values: torch.Tensor) -> list[list[torch.Tensor]]:
        """The inverse of `padded`: [N, C] as per-completion vectors of each group, on the CPU."""
        values = values.detach().float().cpu()
        rows = iter(values)
        return [
            [next(rows)[: completion.length].clone() for completion in group.completions]
            for group in self.groups
        ]


def _one_batch(groups: Sequence[Group], pad_id: int, multiple: int) -> SequenceBatch:
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    longest = max(prompt.length + completion.length for prompt, completion in rows)
    width = -(-longest // multiple) * multiple
    count, tokens = len(rows), max(completion.length for _, completion in rows)
    ids = torch.full((count, width), pad_id)
    positions = torch.zeros(3, count, width, dtype=torch.long)
    is_vision = torch.zeros(count, width, dtype=torch.bool)
    mask = torch.zeros(count, tokens, dtype=torch.bool)
    answer_mask = torch.zeros_like(mask)
    index = torch.zeros(count, tokens, dtype=torch.long)
    # The token at column t is predicted at column t - 1.
    first = min(prompt.length for prompt, _ in rows) - 1
    for row, (prompt, completion) in enumerate(rows):
        start, stop = prompt.length, prompt.length + completion.length
        ids[row, :start] = prompt.token_ids
        ids[row, start:stop] = completion.token_ids
        is_vision[row, :start] = prompt.is_vision
        positions[:, row, :start] = prompt.position_ids
        positions[:, row, start:stop] = prompt.continued_positions(completion.length)
        mask[row, : completion.length] = True
        index[row, : completion.length] = torch.arange(start - 1, stop - 1) - first
        if completion.answer_span is not None:
            answer_mask[row, slice(*completion.answer_span)] = True
    pixels = [p.pixel_values for p, _ in rows if p.pixel_values is not None]
    grids = [p.grid_thw for p, _ in rows if p.grid_thw is not None]
    device = compute_device()
    inputs = ModelInputs(
        token_ids=ids.to(device),
        position_ids=positions.to(device),
        pixel_values=torch.cat(pixels).to(device) if pixels else None,
        grid_thw=torch.cat(grids).to(device) if grids else None,
        is_vision=is_vision.to(device) if pixels else None,
        # Padding lies behind every real token, so the causal mask hides it.
        attention_mask=None,
    )
    return SequenceBatch(
        groups,
        inputs,
        mask.to(device),
        answer_mask.to(device),
        slice(first, longest),
        index.to(device),
    )


def sequence_batches(groups: Sequence[Group], layout: BatchLayout) -> list[SequenceBatch]:
    """The groups as micro-batches."""
    size = layout.groups_per_batch
    return [
        _one_batch(groups[start : start + size], layout.pad_id, layout.multiple)
        for start in range(0, len(groups), size)
    ]
