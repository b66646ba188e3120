"""The shared-prompt layout: one sequence [prompt | completion 1 | ... | completion G] per group.

The vision tower and the prompt are computed once per group, forward and backward. The completions'
lengths may differ; each one's positions continue from the prompt's end, and it attends to the
prompt and itself.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nemo_care.groups.batch import AnswerPairs, GroupBatch, Rows
from nemo_care.groups.group import Group
from nemo_care.groups.routing import Span
from nemo_care.megatron.cpu import compute_device
from nemo_care.models.segments import PackedSegments, Range, Segment


@dataclass(frozen=True)
class PackedGroup:
    """One group as one sequence of S = P + sum of C_i tokens (plus those of answer pairs).

    `token_ids` [S], `position_ids` [3, S]. `segments` define the attention; `places` hold, per
    completion, where its tokens are predicted, long [C_i]. All indices count from the group's
    first token. `pairs` is None unless requested.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[Segment, ...]
    places: list[torch.Tensor]
    pairs: AnswerPairs | None

    @property
    def length(self) -> int:
        """S, the number of tokens."""
        return len(self.token_ids)


def pack_group(group: Group, *, answer_pairs: bool = False) -> PackedGroup:
    """Lay out one group, with `answer_pairs` also each answer after each reasoning."""
    return _Packer(group).pack(answer_pairs)


class _Packer:
    """Appends one segment after another."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.prompt: Range = (0, group.prompt.length)
        self.token_ids = [group.prompt.token_ids]
        self.position_ids = [group.prompt.position_ids]
        self.segments = [Segment(*self.prompt)]

    def pack(self, answer_pairs: bool) -> PackedGroup:
        places = []
        for completion in self.group.completions:
            start = self._append(completion.token_ids, (self.prompt,), 0)
            # The first token is predicted at the prompt's last one.
            places.append(torch.arange(start - 1, start - 1 + completion.length))
            places[-1][0] = self.prompt[1] - 1
        pairs = self._answer_pairs() if answer_pairs else None
        return PackedGroup(
            torch.cat(self.token_ids),
            torch.cat(self.position_ids, dim=1),
            tuple(self.segments),
            places,
            pairs,
        )

    def _append(self, token_ids: torch.Tensor, context: tuple[Range, ...], offset: int) -> int:
        """Add a segment with positions from `offset` after the prompt; return where it starts."""
        start = self.segments[-1].stop
        positions = self.group.prompt.continued_positions(offset + len(token_ids))
        self.token_ids.append(token_ids)
        self.position_ids.append(positions[:, offset:])
        self.segments.append(Segment(start, start + len(token_ids), context))
        return start

    def _answer_pairs(self) -> AnswerPairs:
        """Lay out every answer after every reasoning.

        The giver's tokens continue from a cut in the reasoner's opening tag: the last place of the
        tag where a token of both begins. So a token that contains the end of the tag and the answer
        (`>B`) does not follow a complete tag, and every answer has the tokens that were sampled.
        Without such a place, the pair does not exist.
        """
        ids, where, numbers = [], [], []
        for j, reasoner in enumerate(self.group.completions):
            if reasoner.answer_span is None:
                continue
            known: dict[tuple[int, ...], torch.Tensor] = {}
            for i, giver in enumerate(self.group.completions):
                if giver.answer_span is None:
                    continue
                shared = giver.cuts.keys() & reasoner.cuts.keys()
                if not shared:
                    continue
                begin, (start, end) = giver.cuts[max(shared)], giver.answer_span
                at, tokens = reasoner.cuts[max(shared)], giver.token_ids[begin:end]
                key = (at, *tokens.tolist())
                if key not in known:
                    known[key] = self._branch(j, at, tokens)
                # Between the cut and the answer there can be the rest of the tag, and white space.
                ids.append(tokens[start - begin :])
                where.append(known[key][start - begin :])
                numbers.append(torch.full((end - start,), i * self.group.size + j))
        nothing = torch.zeros(0, dtype=torch.long)
        return AnswerPairs(
            torch.cat([nothing, *ids]), torch.cat([nothing, *where]), torch.cat([nothing, *numbers])
        )

    def _branch(self, number: int, at: int, tokens: torch.Tensor) -> torch.Tensor:
        """Put tokens after the first `at` of a completion; return where each is predicted.

        Only tokens that differ from the completion's own continuation are added to the sequence,
        and not the last one, which predicts nothing: none at all for one-token letters.
        """
        segment = self.segments[1 + number]
        own = self.group.completions[number].token_ids[at : at + len(tokens)]
        differs = (own != tokens[: len(own)]).nonzero()
        common = int(differs[0]) if len(differs) else len(own)
        before = [at + place for place in range(min(common + 1, len(tokens)))]
        places = [segment.start + n - 1 if n else self.prompt[1] - 1 for n in before]
        rest = tokens[common:-1]
        if len(rest):
            seen = at + common
            context = (self.prompt, (segment.start, segment.start + seen))
            start = self._append(rest, context if seen else (self.prompt,), seen)
            places.extend(range(start, start + len(rest)))
        return torch.tensor(places)


def packed_groups(
    groups: Sequence[Group], pad_id: int, multiple: int, *, answer_pairs: bool = False
) -> GroupBatch:
    """Return the groups as one row (B = 1), padded so that S is a multiple of `multiple`."""
    packed = [pack_group(group, answer_pairs=answer_pairs) for group in groups]
    starts = [0, *itertools.accumulate(part.length for part in packed)]
    used = starts[-1]
    width = -(-used // multiple) * multiple
    ids = torch.full((1, width), pad_id)
    positions = torch.zeros(3, 1, width, dtype=torch.long)
    is_vision = torch.zeros(1, width, dtype=torch.bool)
    segments: list[Segment] = []
    places: list[torch.Tensor] = []
    spans: list[Span] = []
    for group, part, start in zip(groups, packed, starts, strict=False):
        ids[0, start : start + part.length] = part.token_ids
        positions[:, 0, start : start + part.length] = part.position_ids
        is_vision[0, start : start + group.prompt.length] = group.prompt.is_vision
        moved = [segment.moved(start) for segment in part.segments]
        segments.extend(moved)
        experts = [group.prompt_routing, *(c.routing for c in group.completions)]
        # The segments that follow those of the completions are answers after other reasonings.
        spans.extend(Span(0, s.start, s.stop, own) for s, own in zip(moved, experts, strict=False))
        places.extend(place + start for place in part.places)
    device = compute_device()
    rows = Rows(
        [group.prompt for group in groups],
        ids,
        positions,
        is_vision,
        PackedSegments(segments=tuple(segments), length=width, device=device),
        spans,
    )
    pairs = _joined_pairs(groups, packed, starts, device) if answer_pairs else None
    return GroupBatch.of(groups, rows, places, pairs)


def _joined_pairs(
    groups: Sequence[Group],
    packed: Sequence[PackedGroup],
    starts: Sequence[int],
    device: torch.device,
) -> AnswerPairs:
    """Return the groups' pairs with places and numbers of the whole row."""
    parts = [part.pairs for part in packed if part.pairs is not None]
    squares = [0, *itertools.accumulate(group.size**2 for group in groups)]
    return AnswerPairs(
        token_ids=torch.cat([part.token_ids for part in parts]).to(device),
        places=torch.cat([p.places + s for p, s in zip(parts, starts, strict=False)]).to(device),
        pair=torch.cat([p.pair + n for p, n in zip(parts, squares, strict=False)]).to(device),
    )
