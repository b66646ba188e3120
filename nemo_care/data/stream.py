"""The training prompts of each step, the same ones for every parallel layout.

The stream is an endless sequence of samples: one seeded permutation per epoch. A step takes the
next B samples that can be used; one that can't (a broken video, a prompt that is too long) is
skipped, counted and listed, and the next one takes its place. Each model replica decodes its
share; the replicas tell each other which failed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nemo_care.data.prompts import Prompt
from nemo_care.data.samples import Sample
from nemo_care.errors import InputError
from nemo_care.parallel.process_groups import Ranks


@dataclass(frozen=True)
class Skipped:
    """A sample that was left out, and why."""

    index: int
    sample_id: str
    reason: str


def build_or_skip(
    build: Callable[[int, Sample], Prompt], index: int, sample: Sample
) -> Prompt | Skipped:
    """The prompt, or the reason why the sample can't be used."""
    try:
        return build(index, sample)
    except InputError as error:
        return Skipped(index, sample.sample_id, str(error))


class PromptStream:
    """Gives each model replica its share of every step's prompts.

    `position` is the place of the next sample in the stream: all that a resumed run needs.
    """

    def __init__(
        self,
        samples: list[Sample],
        build: Callable[[int, Sample], Prompt],
        ranks: Ranks,
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool,
        max_skipped_fraction: float,
    ) -> None:
        """`build` makes a prompt of (stream index, sample); it is called on leaders only."""
        assert prompts_per_step % ranks.data_size == 0, "check_recipe and check_world_size"
        self.samples = samples
        self.build = build
        self.ranks = ranks
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.max_skipped = max_skipped_fraction * len(samples)
        self.position = 0
        self._bad: dict[str, str] = {}
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def _sample(self, index: int) -> Sample:
        epoch, place = divmod(index, len(self.samples))
        if epoch != self._order[0]:
            order = np.arange(len(self.samples))
            if self.shuffle:
                order = np.random.default_rng([self.seed, epoch]).permutation(order)
            self._order = (epoch, order)
        return self.samples[self._order[1][place]]

    def next_step(self) -> tuple[list[Prompt], list[Skipped]]:
        """This replica's prompts of the next step, and the samples that all replicas skipped.

        Collective over all ranks; the ranks of a replica get equal prompts.

        Raises:
            InputError: more of the data set than data.max_skipped_fraction can't be used.
        """
        replicas = self.ranks.data_size
        share = self.prompts_per_step // replicas
        missing = [share] * replicas
        prompts: list[Prompt] = []
        skipped: list[Skipped] = []
        while sum(missing):
            # The next samples are dealt to the replicas that lack prompts, in order.
            owners = [replica for replica in range(replicas) for _ in range(missing[replica])]
            mine = [
                self.position + offset
                for offset, owner in enumerate(owners)
                if owner == self.ranks.data_rank
            ]
            made = self.ranks.from_leader(
                lambda mine=mine: [  # type: ignore[misc]
                    build_or_skip(self.build, index, self._sample(index)) for index in mine
                ]
            )
            self.position += len(owners)
            failed = [item for item in made if isinstance(item, Skipped)]
            prompts.extend(item for item in made if isinstance(item, Prompt))
            everyone = self.ranks.gather_from_replicas(failed)
            missing = [len(items) for items in everyone]
            skipped.extend(item for items in everyone for item in items)
            self._count(skipped)
        return prompts, skipped

    def _count(self, skipped: list[Skipped]) -> None:
        self._bad.update({item.sample_id: item.reason for item in skipped})
        if len(self._bad) > self.max_skipped or len(self._bad) == len(self.samples):
            sample_id, reason = next(iter(self._bad.items()))
            raise InputError(
                f"{len(self._bad)} of {len(self.samples)} training samples can't be used, more "
                f"than data.max_skipped_fraction allows; the first is {sample_id}: {reason}"
            )
