"""The endless order of the training samples: epochs of one data set, or of a weighted mixture.

A place in the order is a whole number, and its sample depends on the place and the seed alone. So
the order is the same on every rank, and a resumed run needs only the place.

An epoch of a mixture has as many prompts as all sources have samples in total. Each source gets
its share of the prompts, and takes them from its own endless sequence, which contains each of its
samples once before it repeats any.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nemo_care.data.annotations import Annotations
from nemo_care.data.samples import Sample
from nemo_care.errors import InputError


@dataclass(frozen=True)
class TrainingData:
    """The training data sets, and their weights in the mixture."""

    sources: tuple[Annotations, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, samples: list[Sample]) -> "TrainingData":
        """Return training data of one data set without bad lines."""
        return cls((Annotations(samples, []),), (1.0,))


def epoch_shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Return each source's prompts per epoch of sum(sizes) prompts: by weight, largest remainder.

    Raises:
        InputError: a weight is too small for its source to get a prompt.
    """
    total = sum(sizes)
    exact = np.array(weights, dtype=np.float64) / sum(weights) * total
    shares = np.floor(exact).astype(np.int64)
    # A stable sort: among equal remainders, the source named first gets the prompt.
    by_remainder = np.argsort(-(exact - shares), kind="stable")
    shares[by_remainder[: total - int(shares.sum())]] += 1
    for number, share in enumerate(shares):
        if share == 0:
            raise InputError(
                f"data.train.sources[{number}].weight={weights[number]:g} is too small: the source "
                f"would give none of an epoch's {total} prompts; raise it or leave the source out"
            )
    return shares.tolist()


class SampleOrder:
    """Maps a place of the endless order to its sample."""

    def __init__(self, data: TrainingData, *, seed: int, shuffle: bool) -> None:
        """Raises InputError if a source would get no prompt."""
        self.data = data
        self.seed = seed
        self.shuffle = shuffle
        self.sizes = [len(source.samples) for source in data.sources]
        self.shares = epoch_shares(self.sizes, data.weights)
        self._epoch = -1
        self._pairs: list[tuple[int, int]] = []

    def at(self, index: int) -> tuple[int, int]:
        """Return the number of the source, and the sample's place in it."""
        epoch, place = divmod(index, sum(self.sizes))
        if epoch != self._epoch:
            self._epoch, self._pairs = epoch, self._draw(epoch)
        return self._pairs[place]

    def sample(self, index: int) -> Sample:
        """Return the sample at a place of the order."""
        source, place = self.at(index)
        return self.data.sources[source].samples[place]

    def _draw(self, epoch: int) -> list[tuple[int, int]]:
        # The j-th of a source's n prompts is at (j + 1/2) / n of the epoch: all are spread evenly.
        spread = np.concatenate([(np.arange(share) + 0.5) / share for share in self.shares])
        turns = np.repeat(np.arange(len(self.shares)), self.shares)
        turns = turns[np.argsort(spread, kind="stable")]
        if self.shuffle:
            turns = np.random.default_rng([self.seed, epoch, 0, 1]).permutation(turns)
        # Only the turns were shuffled: within a source, the order is that of its own sequence.
        places = [
            iter(self._places(source, epoch * share, share))
            for source, share in enumerate(self.shares)
        ]
        return [(source, next(places[source])) for source in turns.tolist()]

    def _places(self, source: int, start: int, count: int) -> list[int]:
        """Return `count` places of a source's own endless sequence, from its `start`-th on."""
        size = self.sizes[source]
        first, last = start // size, (start + count - 1) // size
        rounds = np.concatenate([self._round(source, number) for number in range(first, last + 1)])
        skipped = start - first * size
        return rounds[skipped : skipped + count].tolist()

    def _round(self, source: int, number: int) -> np.ndarray:
        """Return every place of a source once."""
        places = np.arange(self.sizes[source])
        if not self.shuffle:
            return places
        # The first source's seed equals that of a data set without a mixture.
        seed = [self.seed, number, source] if source else [self.seed, number]
        return np.random.default_rng(seed).permutation(places)
