"""Evaluate a model on samples, one completion each; used by validation and `nemo-care evaluate`.

A replica generates its share of a batch, submits it to the judge, and the rows of all replicas are
gathered when their verdicts have arrived. A slow judge (a language model) replies while the next
batches are generated.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from nemo_care.data.loader import Numbered, PromptLoader
from nemo_care.data.prompts import Prompt, without_frames
from nemo_care.data.samples import Sample, Skipped
from nemo_care.evaluation.judges import Judge, Verdict
from nemo_care.evaluation.measures import Measure
from nemo_care.evaluation.rows import Row, completion_row
from nemo_care.groups.group import Group
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.schema import EvaluationConfig
from nemo_care.rollouts.generator import Generator, Sampling

# Separates an evaluation's random numbers from those of training.
_SEED_DOMAIN = 1
# Batches that can wait for verdicts: what a kill loses, and how far a slow judge can lag.
_PENDING = 4


@dataclass(frozen=True)
class Evaluated:
    """The results of one batch, over all replicas, by index."""

    rows: list[Row]
    skipped: list[Skipped]


@dataclass(frozen=True)
class _Asked:
    """This replica's share of a batch, generated but possibly not judged yet."""

    rows: list[Row]
    verdicts: list[Future[Verdict]]
    skipped: list[Skipped]


class Evaluator:
    """Evaluates a model with the generator and scoring pass of training."""

    def __init__(
        self,
        loader: PromptLoader,
        generator: Generator,
        judge: Judge,
        measures: Sequence[Measure],
        ranks: Ranks,
        config: EvaluationConfig,
        *,
        max_tokens: int,
        min_reasoning_words: int,
        seed: int,
        check: Callable[[Sequence[Group]], None],
    ) -> None:
        """Make prompts with `loader`, on leaders only, one batch ahead; `measures` give columns of
        each row; `check` receives the first groups and raises if they can't be right."""
        self.loader = loader
        self.generator = generator
        self.judge = judge
        self.measures = measures
        self.ranks = ranks
        self.config = config
        self.min_reasoning_words = min_reasoning_words
        self.check = check
        self._checked = False
        # Random numbers depend on the sample's index only, not on the batch, the layout or a
        # restart.
        self.sampling = Sampling(
            group_size=1,
            temperature=config.temperature,
            top_p=config.top_p,
            max_tokens=max_tokens,
            seed=(seed, _SEED_DOMAIN),
        )

    def run(self, samples: Sequence[Sample], done: Collection[int] = ()) -> Iterator[Evaluated]:
        """Evaluate every sample whose index is not in `done`; batches in order, on all ranks.

        The composition of batches does not depend on `done`, so a resumed evaluation computes what
        an uninterrupted one would have computed.
        """
        pending: deque[_Asked] = deque()
        for made in self._prompts(samples, self._shares(len(samples), frozenset(done))):
            pending.append(self._ask(made))
            while pending and (len(pending) > _PENDING or self._is_judged(pending[0])):
                yield self._collect(pending.popleft())
        self.generator.rest()
        while pending:
            yield self._collect(pending.popleft())

    def close(self) -> None:
        """Close the judge and the generator; no evaluation is possible afterwards."""
        self.judge.close()
        self.generator.close()

    def _shares(self, count: int, done: frozenset[int]) -> list[list[int]]:
        """Return this replica's part of each batch of `count` samples that is not complete."""
        replicas = self.ranks.data_size
        size = self.config.samples_per_batch * replicas
        shares = []
        for start in range(0, count, size):
            batch = range(start, min(start + size, count))
            if not done.issuperset(batch):
                mine = batch[self.ranks.data_rank :: replicas]
                shares.append([index for index in mine if index not in done])
        return shares

    def _prompts(
        self, samples: Sequence[Sample], shares: Sequence[Sequence[int]]
    ) -> Iterator[list[Prompt | Skipped]]:
        """Yield the prompts of each share; the next share is decoded meanwhile."""

        def share(number: int) -> list[Numbered]:
            return [(index, samples[index]) for index in shares[number]]

        def load(number: int) -> list[Prompt | Skipped]:
            made = self.loader.load(share(number))
            self.loader.prefetch(share(number + 1) if number + 1 < len(shares) else ())
            return made

        for number in range(len(shares)):
            yield self.ranks.from_leader(
                lambda number=number: load(number),  # type: ignore[misc]
                for_others=without_frames,
            )

    def _ask(self, made: Sequence[Prompt | Skipped]) -> _Asked:
        """Generate, measure, and submit to the judge.

        Raises:
            RuntimeError: the model's probabilities are not numbers, so its answers mean nothing.
            RunFailed: the first groups of a replica can't be right; raised on all ranks.
        """
        prompts = [item for item in made if isinstance(item, Prompt)]
        groups = self.generator.generate(prompts, self.sampling)
        for group in groups:
            if any(bool(completion.log_probs.isnan().any()) for completion in group.completions):
                raise RuntimeError(
                    f"the model's probabilities are not numbers for sample "
                    f"{group.prompt.sample.sample_id}: look for NaN in its weights, or set "
                    "model.precision.dtype=fp32"
                )
        self.ranks.together(lambda: self._check_once(groups))
        rows = [
            completion_row(
                group,
                min_reasoning_words=self.min_reasoning_words,
                untagged_counts=self.config.untagged == "whole_text",
            )
            for group in groups
        ]
        for measure in self.measures:
            rows = [row | columns for row, columns in zip(rows, measure(groups), strict=True)]
        return _Asked(
            rows,
            self.judge.judge(groups),
            [item for item in made if isinstance(item, Skipped)],
        )

    def _check_once(self, groups: Sequence[Group]) -> None:
        # A replica's share of a batch can be empty.
        if groups and not self._checked:
            self.check(groups)
            self._checked = True

    def _is_judged(self, asked: _Asked) -> bool:
        """Whether all replicas have their verdicts for this batch."""
        mine = all(verdict.done() for verdict in asked.verdicts)
        return all(self.ranks.gather_from_replicas(mine))

    def _collect(self, asked: _Asked) -> Evaluated:
        """Wait for the verdicts and return the batch of all replicas."""

        def judged() -> list[Row]:
            verdicts = [future.result() for future in asked.verdicts]
            return [
                {**row, "consistent": verdict.consistent, **verdict.details}
                for row, verdict in zip(asked.rows, verdicts, strict=True)
            ]

        rows = self.ranks.from_leader(judged)
        parts = self.ranks.gather_from_replicas((rows, asked.skipped))
        return Evaluated(
            sorted((row for rows, _ in parts for row in rows), key=lambda row: row["index"]),
            sorted((item for _, skipped in parts for item in skipped), key=lambda i: i.index or 0),
        )
