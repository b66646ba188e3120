"""The simple layout: one sequence [prompt | completion] per completion.

Each of the G sequences of a group contains the whole prompt. This layout is the reference for
`packed.py` in tests; `algorithm.shared_prompt=false` trains with it.
"""

from collections.abc import Sequence

import torch

from nemo_care.groups.batch import GroupBatch, Rows
from nemo_care.groups.group import Group
from nemo_care.groups.routing import Span


def separate_sequences(groups: Sequence[Group], pad_id: int, multiple: int) -> GroupBatch:
    """Return completions as B = N right-padded rows, S a multiple of `multiple` tokens."""
    rows = [(group, completion) for group in groups for completion in group.completions]
    count = len(rows)
    longest = max(group.prompt.length + completion.length for group, completion in rows)
    width = -(-longest // multiple) * multiple
    ids = torch.full((count, width), pad_id)
    positions = torch.zeros(3, count, width, dtype=torch.long)
    is_vision = torch.zeros(count, width, dtype=torch.bool)
    places = []
    spans = []
    for row, (group, completion) in enumerate(rows):
        prompt = group.prompt
        start, stop = prompt.length, prompt.length + completion.length
        ids[row, :start] = prompt.token_ids
        ids[row, start:stop] = completion.token_ids
        is_vision[row, :start] = prompt.is_vision
        positions[:, row, :start] = prompt.position_ids
        positions[:, row, start:stop] = prompt.continued_positions(completion.length)
        spans.append(Span(row, 0, start, group.prompt_routing))
        spans.append(Span(row, start, stop, completion.routing))
        # The token at s is predicted at s - 1. The causal mask hides the padding after it.
        places.append(torch.arange(start - 1, stop - 1) * count + row)
    prompts = [group.prompt for group, _ in rows]
    made = Rows(prompts, ids, positions, is_vision, spans=spans)
    return GroupBatch.of(groups, made, places)
