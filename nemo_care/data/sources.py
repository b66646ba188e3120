"""From the recipe's data keys to samples: the one place that knows the loader of each kind."""

from dataclasses import replace

from nemo_care.data.annotations import Annotations
from nemo_care.data.jsonl import read_jsonl
from nemo_care.data.mixing import TrainingData, epoch_shares
from nemo_care.data.samples import too_many_skipped
from nemo_care.data.seed_bench_r1 import read_seed_bench_r1
from nemo_care.data.video_r1 import read_video_r1
from nemo_care.errors import InputError
from nemo_care.objective.rewards import accuracy_reward, evaluation_accuracy
from nemo_care.recipe.data import DataConfig, SourceConfig


def read_source(
    kind: str, root: str, annotations: str, *, seed: int, for_training: bool
) -> Annotations:
    """The samples and the bad lines of one annotations file.

    `seed` is the run's; it draws the options of SEED-Bench-R1's training questions. `for_training`:
    solutions must be such that an answer gets the reward, for validation the evaluation's accuracy.

    Raises:
        InputError: the file is missing, empty or without any usable sample.
    """
    accuracy = accuracy_reward if for_training else evaluation_accuracy
    if kind == "seed_bench_r1":
        return read_seed_bench_r1(root, annotations, seed=seed)
    if kind == "video_r1":
        return read_video_r1(root, annotations, accuracy=accuracy)
    assert kind in ("jsonl", "miniature"), "check_recipe"
    return read_jsonl(root, annotations, accuracy=accuracy)


def training_sources(config: DataConfig) -> list[SourceConfig]:
    """The sources of the mixture; one where the recipe has none."""
    train = config.train
    if train.sources is not None:
        return train.sources
    assert train.root is not None, "check_training"
    return [SourceConfig(train.kind, train.root, train.annotations)]


def read_training(config: DataConfig, *, seed: int) -> TrainingData:
    """The training data sets of a recipe.

    Raises:
        InputError: unusable annotations, more bad lines than data.max_skipped_fraction allows, or a
            source whose weight gives it no prompt.
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
    """Validation samples by level, data.validation.samples_per_level of each, and its bad lines.

    Raises:
        InputError: as `read_training`.
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
