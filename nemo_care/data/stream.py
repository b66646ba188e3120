"""The training prompts of each step, the same for every parallel layout.

The stream is an endless sequence of samples (`SampleOrder`: one seeded permutation per epoch). A
step takes the next B usable samples; an unusable one (a broken video, a prompt that is too long) is
skipped, counted and listed, and replaced by the next. Each model replica decodes its share during
the previous step; then the replicas exchange which samples failed.
"""

from collections.abc import Sequence

from nemo_care.data.loader import Numbered, PromptLoader
from nemo_care.data.mixing import SampleOrder, TrainingData
from nemo_care.data.prompts import Prompt, without_frames
from nemo_care.data.samples import Skipped, too_many_skipped
from nemo_care.errors import InputError
from nemo_care.ranks.process_groups import Ranks


class TooManySkipped(InputError):
    """More of a data set is unusable than data.max_skipped_fraction allows.

    `skipped` are those of the step that ends the run, which are not reported elsewhere.
    """

    def __init__(self, message: str, skipped: Sequence[Skipped] = ()) -> None:
        """Create the error with the samples that the last step skipped."""
        super().__init__(message)
        self.skipped = skipped


class PromptStream:
    """Provides each model replica with its share of every step's prompts.

    `position` is the place of the next sample in the stream, all that a resumed run needs.
    """

    def __init__(
        self,
        data: TrainingData,
        loader: PromptLoader,
        ranks: Ranks,
        *,
        prompts_per_step: int,
        seed: int,
        shuffle: bool,
        max_skipped_fraction: float,
        prefetch_steps: int = 1,
    ) -> None:
        """`loader` creates the prompts, on leaders only, `prefetch_steps` steps ahead.

        Raises:
            InputError: a source of the mixture would get no prompt.
        """
        assert prompts_per_step % ranks.data_size == 0, "check_recipe and check_world_size"
        self.data = data
        self.order = SampleOrder(data, seed=seed, shuffle=shuffle)
        self.loader = loader
        self.ranks = ranks
        self.prompts_per_step = prompts_per_step
        self.max_skipped_fraction = max_skipped_fraction
        self.prefetch_steps = prefetch_steps
        self.position = 0
        # Unusable samples so far, by source and place.
        self._unusable: list[dict[int, Skipped]] = [{} for _ in data.sources]

    def next_step(self) -> tuple[list[Prompt], list[Skipped]]:
        """Return this replica's prompts of the next step, and the samples skipped by all replicas.

        Collective over all ranks; the ranks of a replica get equal prompts, of which only the
        leader's have frames.

        Raises:
            TooManySkipped: more of a data set is unusable than data.max_skipped_fraction allows.
        """
        replicas = self.ranks.data_size
        missing = [self.prompts_per_step // replicas] * replicas
        prompts: list[Prompt] = []
        skipped: list[Skipped] = []
        while sum(missing):
            made = self.ranks.from_leader(
                lambda: self._load(missing),  # noqa: B023 - called at once
                for_others=without_frames,
            )
            self.position += sum(missing)
            failed = [item for item in made if isinstance(item, Skipped)]
            prompts.extend(item for item in made if isinstance(item, Prompt))
            everyone = self.ranks.gather_from_replicas(failed)
            missing = [len(items) for items in everyone]
            skipped.extend(item for items in everyone for item in items)
            self.count(skipped)
        if self.ranks.is_model_leader:
            self.loader.prefetch(self._next_samples())
        return prompts, skipped

    def _load(self, missing: Sequence[int]) -> list[Prompt | Skipped]:
        """Load this replica's next prompts, on its leader; see `_dealt`."""
        return self.loader.load(self._dealt(self.position, missing))

    def _dealt(self, position: int, missing: Sequence[int]) -> list[Numbered]:
        """Return this replica's part of the samples from `position` on.

        `missing` is how many prompts each replica lacks.
        """
        first = position + sum(missing[: self.ranks.data_rank])
        places = range(first, first + missing[self.ranks.data_rank])
        return [(place, self.order.sample(place)) for place in places]

    def _next_samples(self) -> list[Numbered]:
        """Return the samples of this replica in the next steps, assuming that all are usable."""
        replicas = self.ranks.data_size
        missing = [self.prompts_per_step // replicas] * replicas
        return [
            item
            for step in range(self.prefetch_steps)
            for item in self._dealt(self.position + step * self.prompts_per_step, missing)
        ]

    @property
    def worker_memory_gib(self) -> float | None:
        """The highest memory of a process that decodes for this replica; None without any."""
        return self.loader.workers.peak_memory_gib

    @property
    def frame_bytes(self) -> int:
        """Bytes of the frames that were decoded ahead for this replica."""
        return self.loader.frame_bytes

    def count(self, skipped: Sequence[Skipped]) -> None:
        """Count skipped samples, such as those that a run had skipped before it was killed.

        Raises:
            TooManySkipped: see `next_step`.
        """
        for item in skipped:
            assert item.index is not None, "it came from the stream"
            source, place = self.order.at(item.index)
            self._unusable[source].setdefault(place, item)
        for annotations, unusable in zip(self.data.sources, self._unusable, strict=True):
            count = len(annotations.bad) + len(unusable)
            if unusable and too_many_skipped(count, annotations.total, self.max_skipped_fraction):
                first = next(iter(unusable.values()))
                raise TooManySkipped(
                    f"{count} of {annotations.total} training samples can't be used, more "
                    f"than data.max_skipped_fraction allows; the first is {first.sample_id}: "
                    f"{first.reason}",
                    skipped,
                )
