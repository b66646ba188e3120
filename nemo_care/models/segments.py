"""The attention structure of a packed sequence: a tree of segments.

A packed group is one sequence [prompt | completion 1 | ... | completion G | padding]. Its prompt is
a segment without context, and each completion is a segment with the prompt as its context. Other
trees are possible: several groups in one sequence, or an answer after the reasoning of another one.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property

import torch
from megatron.core.packed_seq_params import PackedSeqParams

Range = tuple[int, int]

# Segments share one attention call if none is padded by more than a quarter of the longest's
# length, or by a few tokens: many small calls cost more than a little padding.
_PADDED_SHARE = 0.25
_PADDED_TOKENS = 16


@dataclass(frozen=True)
class Segment:
    """The tokens [start, stop) of a sequence; they attend to `context` and causally to themselves.

    `context` has half-open token ranges in order of position.
    """

    start: int
    stop: int
    context: tuple[Range, ...] = ()

    @property
    def length(self) -> int:
        """The number of tokens in the segment itself."""
        return self.stop - self.start

    def moved(self, by: int) -> "Segment":
        """Return the segment for a sequence that begins `by` tokens earlier."""
        context = tuple((start + by, stop + by) for start, stop in self.context)
        return Segment(self.start + by, self.stop + by, context)


@dataclass(frozen=True)
class Bucket:
    """n segments of similar length with the same context, for one attention call.

    `length` is L of the longest, `tokens` long [n * L] are the places of each segment's tokens,
    right-padded with its last token.
    """

    context: tuple[Range, ...]
    segments: tuple[Segment, ...]
    length: int
    tokens: torch.Tensor

    @property
    def count(self) -> int:
        """n, the number of segments."""
        return len(self.segments)


@dataclass(frozen=True)
class VariableLengths:
    """The segments as rows of unequal length, for kernels that support such rows.

    Row i has the queries [query_starts[i], query_starts[i + 1]) of the sequence and the keys
    `keys[key_starts[i] : key_starts[i + 1]]` (context and itself), causal from the bottom right.
    Starts are int32 [rows + 1], `keys` long [all keys].
    """

    query_starts: torch.Tensor
    key_starts: torch.Tensor
    keys: torch.Tensor
    longest_query: int
    longest_key: int


@dataclass
class PackedSegments(PackedSeqParams):
    """The segments of one packed sequence, in order and without gaps, followed by padding.

    Megatron passes its `packed_seq_params` unchanged to every layer's attention (format "sbhd", so
    that Megatron does not treat the sequence as packed in its own format).
    """

    qkv_format: str = "sbhd"
    segments: tuple[Segment, ...] = ()
    length: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        """Raises ValueError if the segments are not consecutive, or have a later context."""
        end = 0
        for segment in self.segments:
            if segment.start != end or segment.stop <= segment.start:
                raise ValueError(f"segments must follow each other and not be empty: {segment}")
            if any(stop > segment.start or start >= stop for start, stop in segment.context):
                raise ValueError(f"a context must precede its segment: {segment}")
            end = segment.stop
        if end > self.length:
            raise ValueError(f"segments of {end} tokens in a sequence of {self.length}")

    @property
    def used(self) -> int:
        """The number of tokens that are not padding."""
        return self.segments[-1].stop if self.segments else 0

    @cached_property
    def buckets(self) -> list[Bucket]:
        """The segments grouped for batched attention; computed once, used by every layer."""
        by_context: dict[tuple[Range, ...], list[Segment]] = defaultdict(list)
        for segment in self.segments:
            by_context[segment.context].append(segment)
        buckets = []
        for context, segments in by_context.items():
            for members in _of_similar_length(segments):
                longest = members[0].length
                tokens = [
                    (torch.arange(longest) + segment.start).clamp(max=segment.stop - 1)
                    for segment in members
                ]
                where = torch.cat(tokens).to(self.device)
                buckets.append(Bucket(context, tuple(members), longest, where))
        return buckets

    @cached_property
    def places(self) -> torch.Tensor:
        """Each token's place among the outputs of all buckets, concatenated, long [length].

        Padding tokens have the place after the last one.
        """
        total = sum(len(bucket.tokens) for bucket in self.buckets)
        places = torch.full((self.length,), total)
        offset = 0
        for bucket in self.buckets:
            for segment in bucket.segments:
                row = offset + torch.arange(segment.length)
                places[segment.start : segment.stop] = row
                offset += bucket.length
        return places.to(self.device)

    @cached_property
    def variable_lengths(self) -> VariableLengths:
        """The segments for a variable-length kernel."""
        keys = [
            torch.cat([torch.arange(*part) for part in (*s.context, (s.start, s.stop))])
            for s in self.segments
        ]
        queries = torch.tensor([segment.length for segment in self.segments])
        lengths = torch.tensor([len(part) for part in keys])
        return VariableLengths(
            query_starts=_starts(queries).to(self.device),
            key_starts=_starts(lengths).to(self.device),
            keys=torch.cat(keys).to(self.device),
            longest_query=int(queries.max()),
            longest_key=int(lengths.max()),
        )


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).int()


def _of_similar_length(segments: list[Segment]) -> list[list[Segment]]:
    """Split into lists, longest first, in which padding to the longest is cheap."""
    lists: list[list[Segment]] = []
    for segment in sorted(segments, key=lambda segment: -segment.length):
        longest = lists[-1][0].length if lists else 0
        allowed = max(longest * _PADDED_SHARE, _PADDED_TOKENS)
        if lists and longest - segment.length <= allowed:
            lists[-1].append(segment)
        else:
            lists.append([segment])
    return lists
