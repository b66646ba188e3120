"""The training prompts of each step, the same ones for every parallel layout.

The stream is an endless sequence of samples (`SampleOrder`: one seeded permutation per epoch). A
step takes the next B samples that can be used; one that can't (a broken video, a prompt that is
too long) is skipped, counted and listed, and the next one takes its place. Each model replica
decodes its share; the replicas tell each other which failed.
"""

from collections.abc import Callable

from nemo_care.data.mixing import SampleOrder, TrainingData
from nemo_care.data.prompts import Prompt
from nemo_care.data.samples import Sample, Skipped
from nemo_care.errors import InputError
from nemo_care.parallel.process_groups import Ranks


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
        data: TrainingData,
        build: Callable[[int, Sample], Prompt],
        ranks: Ranks,
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool,
        max_skipped_fraction: float,
    ) -> None:
        """`build` makes a prompt of (stream index, sample); it is called on leaders only.

        Raises:
            InputError: a source of the mixture would get no prompt.
        """
        assert prompts_per_step % ranks.data_size == 0, "check_recipe and check_world_size"
        self.data = data
        self.order = SampleOrder(data, seed=seed, shuffle=shuffle)
        self.build = build
        self.ranks = ranks
        self.prompts_per_step = prompts_per_step
        self.max_skipped_fraction = max_skipped_fraction
        self.position = 0
        # By source, and there by place: what has turned out unusable so far.
        self._unusable: list[dict[int, Skipped]] = [{} for _ in data.sources]

    def next_step(self) -> tuple[list[Prompt], list[Skipped]]:
        """This replica's prompts of the next step, and the samples that all replicas skipped.

        Collective over all ranks; the ranks of a replica get equal prompts.

        Raises:
            InputError: more of a data set than data.max_skipped_fraction can't be used.
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
                    build_or_skip(self.build, index, self.order.sample(index)) for index in mine
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
        for item in skipped:
            assert item.index is not None, "it came from the stream"
            source, place = self.order.at(item.index)
            self._unusable[source].setdefault(place, item)
        for annotations, unusable in zip(self.data.sources, self._unusable, strict=True):
            count = len(annotations.bad) + len(unusable)
            too_many = count > self.max_skipped_fraction * annotations.total
            if unusable and (too_many or count == annotations.total):
                first = next(iter(unusable.values()))
                raise InputError(
                    f"{count} of {annotations.total} training samples can't be used, more "
                    f"than data.max_skipped_fraction allows; the first is {first.sample_id}: "
                    f"{first.reason}"
                )
