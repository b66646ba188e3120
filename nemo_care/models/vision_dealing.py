"""The vision tower's work dealt to tensor-parallel ranks: whose frames are whose.

Each of the ranks computes the features of some frames, all ranks get the features of all. What
follows is the same on all of them, and so is the gradient of the features: each rank takes its own
share of it back into the tower, without communication. The gradients of the tower's parameters are
then parts of a sum over these ranks (see `VideoLanguageModel.deal_vision`).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from nemo_care.data.patches import Grid
from nemo_care.models.family import Family


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """Numbers of the items that each rank gets, ascending, such that their sizes are balanced.

    The largest item goes first, and each to the rank that has the least: no rank has more than 4/3
    of what it would have in the best of all deals (Graham 1969).
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    sums = [0] * ranks
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        rank = min(range(ranks), key=lambda rank: sums[rank])
        dealt[rank].append(number)
        sums[rank] += sizes[number]
    return [sorted(numbers) for numbers in dealt]


@dataclass(frozen=True)
class VisionDealing:
    """Which parts of the images and videos of a micro-batch each rank computes.

    `parts` are all of them in order of appearance, `patches` and `tokens` their sizes. `shares`
    holds the numbers of each rank's parts.
    """

    parts: list[Grid]
    patches: list[int]
    tokens: list[int]
    shares: list[list[int]]
    joins: bool

    @classmethod
    def of(cls, family: Family, grids: Sequence[Grid], ranks: int) -> "VisionDealing":
        """The deal for `ranks` ranks of images and videos of these grids, balanced by patches."""
        apart = family.computes_frames_apart
        parts = [part for t, h, w in grids for part in ([(1, h, w)] * t if apart else [(t, h, w)])]
        patches = [t * h * w for t, h, w in parts]
        tokens = [family.prompt.patching.tokens(part) for part in parts]
        return cls(parts, patches, tokens, deal(patches, ranks), joins=apart)

    def computed(self, rank: int) -> list[int]:
        """The parts that a rank runs the tower on: its share.

        A rank without a share computes the smallest part once more, which is not used. So its
        parameters have a gradient, of 0, for which data parallelism may be waiting.
        """
        if self.shares[rank]:
            return self.shares[rank]
        return [min(range(len(self.parts)), key=lambda number: self.patches[number])]

    def grids(self, rank: int) -> list[Grid]:
        """Grids of what a rank computes, frames of one size joined to one video."""
        grids = [self.parts[number] for number in self.computed(rank)]
        if not self.joins:
            return grids
        runs = ((size, len(list(run))) for size, run in itertools.groupby(grids))
        return [(count, h, w) for (_, h, w), count in runs]

    def pixels(self, rank: int, pixel_values: torch.Tensor) -> torch.Tensor:
        """A rank's patches of those of the micro-batch."""
        parts = pixel_values.split(self.patches)
        return torch.cat([parts[number] for number in self.computed(rank)])

    def gather(self, features: torch.Tensor) -> torch.Tensor:
        """The features of all vision tokens, in order, from those that each rank has computed.

        Differentiable; all tensor-parallel ranks call it.
        """
        longest = max(sum(self.tokens[number] for number in share) for share in self.shares)
        padding = features.new_zeros(longest - len(features), *features.shape[1:])
        # Backward takes the own rows of a gradient that is the same on all ranks.
        everyone = gather_from_sequence_parallel_region(
            torch.cat([features, padding]), tensor_parallel_output_grad=False
        )
        return everyone.index_select(0, self._places(longest).to(features.device))

    def _places(self, longest: int) -> torch.Tensor:
        """Where each vision token's features are among those of all ranks, `longest` per rank."""
        starts = [0] * len(self.parts)
        for rank, share in enumerate(self.shares):
            ends = itertools.accumulate((self.tokens[n] for n in share), initial=rank * longest)
            for number, start in zip(share, ends, strict=False):
                starts[number] = start
        spans = zip(starts, self.tokens, strict=True)
        return torch.cat([torch.arange(start, start + count) for start, count in spans])
