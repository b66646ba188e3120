"""A vision tower without its mergers, and the mergers alone.

A merger turns the states of the patches of a vision token, which are next to each other, into the
token's features. With a frozen tower and trained mergers, only the latter run more than once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def not_merging(mergers: Sequence[torch.nn.Module], patches: int) -> Iterator[None]:
    """Inside, the mergers of a tower return the states [patches, M] that they get, one row
    [tokens, `patches` * M] for the patches of each token."""

    def grouped(states: torch.Tensor) -> torch.Tensor:
        return states.reshape(len(states) // patches, -1)

    for merger in mergers:
        merger.forward = grouped
    try:
        yield
    finally:
        for merger in mergers:
            del merger.forward


def merged_by(
    mergers: Sequence[torch.nn.Module], patches: int, states: torch.Tensor
) -> torch.Tensor:
    """The features of the tokens by each of the mergers, one beside the other.

    `states` are what the tower returned inside `not_merging`.
    """
    parts = states.chunk(len(mergers), dim=1)
    of_patches = [part.reshape(len(part) * patches, -1) for part in parts]
    return torch.cat([merger(own) for merger, own in zip(mergers, of_patches, strict=True)], dim=1)
