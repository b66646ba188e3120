"""Read the samples that the recipe's data keys name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_care.data.annotations import Annotations, read_annotations
from nemo_care.data.mixing import TrainingData, epoch_shares
from nemo_care.data.samples import too_many_skipped
from nemo_care.errors import InputError
from nemo_care.objective.rewards import accuracy_reward, evaluation_accuracy
from nemo_care.recipe.data import DATA_KINDS, DataConfig, SourceConfig

if TYPE_CHECKING:
    from nemo_care.ranks.process_groups import Ranks


@dataclass(frozen=True)
class RunData:
    """The samples of a run: its training data sets (if it trains), and those of each level."""

    training: TrainingData | None
    levels: dict[str, Annotations]

    def without_samples(self) -> "RunData":
        """Return the data for ranks that decode nothing; see `Annotations.without_samples`."""
        training = self.training
        if training is not None:
            sources = tuple(source.without_samples() for source in training.sources)
            training = replace(training, sources=sources)
        levels = {level: read.without_samples() for level, read in self.levels.items()}
        return RunData(training, levels)

    @classmethod
    def read(cls, config: DataConfig, *, seed: int, trains: bool = True) -> "RunData":
        """Read the data that a recipe names, with or without the training data.

        Raises:
            InputError: see `read_training`.
        """
        training = read_training(config, seed=seed) if trains else None
        return cls(training, read_levels(config, seed=seed))

    @classmethod
    def on_every_rank(
        cls, ranks: "Ranks", checked: "RunData | None", read: "Callable[[], RunData]"
    ) -> "RunData":
        """Read the data of a run once; the leaders of the replicas get the samples from rank 0.

        The other ranks, which decode nothing, get the number of samples and the bad lines.
        `checked` is the data already read by the check of the inputs; rank 0 calls `read` if it has
        none.
        """
        whole: list[RunData] = []

        def outline() -> RunData:
            whole.append(checked or read())
            return whole[0].without_samples()

        outlined = ranks.from_rank_zero(outline)
        return ranks.on_leaders(whole[0] if whole else None) or outlined


def read_source(
    kind: str, root: str | Path, annotations: str, *, seed: int, for_training: bool
) -> Annotations:
    """Read the samples and the bad lines of one annotations file.

    `seed` is the run's; it chooses the options of SEED-Bench-R1's training questions.
    `for_training`: an answer to each solution must get the reward; otherwise, the evaluation's
    accuracy.

    Raises:
        InputError: the file is missing, empty or without any usable sample.
    """
    accuracy = accuracy_reward if for_training else evaluation_accuracy
    parse = import_module(DATA_KINDS[kind]).parse
    return read_annotations(root, annotations, partial(parse, seed=seed), accuracy=accuracy)


def training_sources(config: DataConfig) -> list[SourceConfig]:
    """Return the sources of the mixture, or the single source of a recipe without one."""
    train = config.train
    if train.sources is not None:
        return train.sources
    assert train.root is not None, "check_training"
    return [SourceConfig(train.kind, train.root, train.annotations)]


def read_training(config: DataConfig, *, seed: int) -> TrainingData:
    """Read the training data sets of a recipe.

    Raises:
        InputError: unusable annotations, more bad lines than data.max_skipped_fraction allows, or a
            source whose weight is too small for a prompt.
    """
    sources = training_sources(config)
    data = TrainingData(
        tuple(
            _read_checked(
                source.kind, source.root, source.annotations, config, seed, for_training=True
            )
            for source in sources
        ),
        tuple(source.weight for source in sources),
    )
    epoch_shares([len(source.samples) for source in data.sources], data.weights)
    return data


def read_levels(config: DataConfig, *, seed: int) -> dict[str, Annotations]:
    """Read data.validation.samples_per_level validation samples of each level, and its bad lines.

    Raises:
        InputError: see `read_training`.
    """
    validation = config.validation
    levels = {}
    for level, file in (validation.annotations or {}).items():
        assert validation.root is not None, "check_data"
        read = _read_checked(
            validation.kind, validation.root, file, config, seed, for_training=False
        )
        levels[level] = replace(read, samples=read.samples[: validation.samples_per_level])
    return levels


def _read_checked(
    kind: str, root: str, annotations: str, config: DataConfig, seed: int, *, for_training: bool
) -> Annotations:
    read = read_source(kind, root, annotations, seed=seed, for_training=for_training)
    if too_many_skipped(len(read.bad), read.total, config.max_skipped_fraction):
        raise InputError(
            f"{len(read.bad)} of {read.total} samples of {annotations} can't be used, more than "
            f"data.max_skipped_fraction={config.max_skipped_fraction:g} allows; the first: "
            f"{read.bad[0].reason}"
        )
    return read
