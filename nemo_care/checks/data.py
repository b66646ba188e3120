"""Read data sets as a run would, and report the faults of each file, line and sample.

No check stops at the first fault, so that a data set can be repaired in one go.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np

from nemo_care.data.annotations import Normalised
from nemo_care.data.decoding import DecodingWorkers
from nemo_care.data.loader import Numbered
from nemo_care.data.media import Media
from nemo_care.data.media_errors import FatalMedia, MissingMedia, SlowMedia, UnreadableMedia
from nemo_care.data.prompts import Draft, PromptBuilder, PromptTooLong
from nemo_care.data.samples import Sample
from nemo_care.data.solutions import is_one_word
from nemo_care.data.sources import read_source, training_sources
from nemo_care.errors import InputError
from nemo_care.recipe.data import DataConfig

BAD_LINE = "bad line"
# The first class that matches an error names its cause.
_CAUSES: tuple[tuple[type[InputError], str], ...] = (
    (MissingMedia, "missing"),
    (SlowMedia, "too slow"),
    (FatalMedia, "crashes decoder"),
    (UnreadableMedia, "unreadable"),
    (PromptTooLong, "too long"),
    (InputError, "other"),
)
CAUSES = (BAD_LINE, *(cause for _, cause in _CAUSES))
"""Why a line or sample can't be used. "crashes decoder": the decoding process died; "other":
for example frames too narrow to resize, or a control token that the tokenizer can't write."""

# Enough that each process has its next request while this one makes prompts of the results.
_IN_FLIGHT_PER_PROCESS = 4


@dataclass(frozen=True)
class DataFile:
    """An annotations file that a recipe names.

    `most` is how many of its samples a run uses; None: all. `name` identifies it in reports.
    """

    name: str
    kind: str
    root: str
    annotations: str
    is_training: bool
    most: int | None = None

    @property
    def path(self) -> Path:
        """Path of the file."""
        return Path(self.root) / self.annotations


def data_files(config: DataConfig) -> list[DataFile]:
    """Return the annotations files of a recipe: training's sources, then validation's levels.

    Raises:
        InputError: the recipe names neither.
    """
    train, validation = config.train, config.validation
    sources = [] if train.root is None and train.sources is None else training_sources(config)
    levels = validation.annotations or {}
    if not sources and not levels:
        raise InputError(
            "data.train.root and data.validation.annotations have no value: name data to check"
        )
    return [
        *(
            DataFile(
                "train" if len(sources) == 1 else f"train[{number}]",
                source.kind,
                source.root,
                source.annotations,
                is_training=True,
            )
            for number, source in enumerate(sources)
        ),
        *(
            DataFile(
                f"validation {level}",
                validation.kind,
                str(validation.root),
                file,
                is_training=False,
                most=validation.samples_per_level,
            )
            for level, file in levels.items()
        ),
    ]


@dataclass(frozen=True)
class Problem:
    """A line or sample that can't be used; `cause` is one of CAUSES.

    `place` is the sample's index in its file, from 0; a line has none, and its `sample_id` is
    FILE:LINE.
    """

    cause: str
    sample_id: str
    place: int | None
    reason: str


@dataclass(frozen=True)
class Length:
    """Tokens of one prompt, and how many of them are pixels; None if it is too long."""

    place: int
    tokens: int
    vision_tokens: int | None


@dataclass
class FileReport:
    """The results for one annotations file and its samples.

    `error` says why the whole file can't be used; everything else is then empty. `lines` counts all
    entries of the file, bad lines included, `samples` those that a run would use, and `checked`
    those that were checked. `normalised` are the solutions that a run converts to the form in which
    rewards are compared.
    """

    file: DataFile
    error: str | None = None
    lines: int = 0
    samples: int = 0
    checked: list[Sample] = field(default_factory=list)
    normalised: list[Normalised] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    lengths: list[Length] = field(default_factory=list)
    missing_files: set[Path] = field(default_factory=set)
    videos_by_pyav: int = 0

    @property
    def causes(self) -> Counter[str]:
        """Count the lines and samples that can't be used, by cause."""
        return Counter(problem.cause for problem in self.problems)

    @property
    def one_word_solutions(self) -> int:
        """Checked free-form solutions of one word, for which no answer scores more than 2/3."""
        return sum(is_one_word(sample.problem_type, sample.solution) for sample in self.checked)

    @property
    def bad_lines(self) -> int:
        """Number of lines that gave no sample."""
        return self.causes[BAD_LINE]

    @property
    def usable(self) -> int:
        """Number of checked samples without a problem."""
        return len(self.checked) - len(self.problems) + self.bad_lines

    @property
    def unusable(self) -> float:
        """Number of unusable lines and samples; an estimate if not all were checked."""
        if not self.checked:
            return self.bad_lines
        return self.bad_lines + (len(self.checked) - self.usable) * self.samples / len(self.checked)

    @property
    def unusable_fraction(self) -> float:
        """Their share of what a run would use."""
        return 1.0 if self.error is not None else self.unusable / (self.bad_lines + self.samples)

    def stops_a_run(self, max_skipped_fraction: float) -> bool:
        """Whether a run rejects the file, or ends once it has read all of its samples.

        A validation continues whatever its media are like; only bad lines count there.
        """
        if self.error is not None or self.bad_lines > max_skipped_fraction * self.lines:
            return True
        too_many = self.unusable > max_skipped_fraction * self.lines
        return self.file.is_training and (too_many or self.usable == 0)


def read_file(file: DataFile, *, seed: int, limit: int | None) -> tuple[FileReport, list[Numbered]]:
    """Return a report with the bad lines, and the samples to check: `limit` of them, or all.

    `seed` is the run's seed.
    """
    try:
        read = read_source(
            file.kind, file.root, file.annotations, seed=seed, for_training=file.is_training
        )
    except InputError as error:
        return FileReport(file, error=str(error)), []
    samples = read.samples[: file.most]
    numbered = [(place, samples[place]) for place in _places(len(samples), limit, seed)]
    report = FileReport(
        file,
        lines=read.total,
        samples=len(samples),
        checked=[sample for _, sample in numbered],
        normalised=read.normalised,
        problems=[Problem(BAD_LINE, bad.sample_id, None, bad.reason) for bad in read.bad],
    )
    return report, numbered


def _places(count: int, limit: int | None, seed: int) -> list[int]:
    """Draw up to `limit` of `count` indices, one from each of `limit` equal stretches."""
    if limit is None or limit >= count:
        return list(range(count))
    edges = np.linspace(0, count, limit + 1).astype(int)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:]).tolist()


def check_samples(
    report: FileReport,
    numbered: Sequence[Numbered],
    builder: PromptBuilder,
    workers: DecodingWorkers,
    *,
    sizes_only: bool,
    done: Callable[[], object],
) -> None:
    """Make a prompt of every sample and add the results to the report.

    With `sizes_only` the media are opened and measured, and only first frames are decoded.
    `done` is called after each sample.

    Raises:
        RuntimeError: the decoding processes do not start.
    """
    for draft, media in _decoded(numbered, builder, workers, sizes_only):
        sample = draft.sample
        try:
            prompt = builder.finish(draft, media.result())
            length = Length(draft.index, prompt.length, int(prompt.is_vision.sum()))
            report.lengths.append(length)
            report.videos_by_pyav += prompt.videos_by_pyav
        except InputError as error:
            cause = next(cause for kind, cause in _CAUSES if isinstance(error, kind))
            report.problems.append(Problem(cause, sample.sample_id, draft.index, str(error)))
            if isinstance(error, PromptTooLong):
                report.lengths.append(Length(draft.index, error.tokens, None))
            if isinstance(error, MissingMedia):
                # The error names only the first missing file; report all.
                files = (*sample.videos, *sample.images)
                report.missing_files.update(file for file in files if not file.is_file())
        done()
    # In the order of the file, whichever process finished first.
    report.lengths.sort(key=lambda length: length.place)
    report.problems.sort(key=lambda problem: -1 if problem.place is None else problem.place)


def _decoded(
    numbered: Sequence[Numbered], builder: PromptBuilder, workers: DecodingWorkers, sizes_only: bool
) -> Iterator[tuple[Draft, Future[Media]]]:
    """Yield drafts with their media, in order of completion; a bounded number is in flight."""
    most = _IN_FLIGHT_PER_PROCESS * max(1, workers.count)
    waiting: dict[Future[Media], Draft] = {}
    rest = iter(numbered)
    while True:
        for index, sample in islice(rest, most - len(waiting)):
            draft = builder.draft(index, sample)
            # room=-1: decode nothing.
            request = replace(draft.request, room=-1) if sizes_only else draft.request
            waiting[workers.submit(request)] = draft
        if not waiting:
            return
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            yield waiting.pop(future), future
