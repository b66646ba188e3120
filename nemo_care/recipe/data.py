"""The keys under `data` of the recipe's schema, and their checks (see schema.py)."""

import math
from dataclasses import dataclass, field, replace

from omegaconf import MISSING

from nemo_care.errors import InputError
from nemo_care.recipe.templates import template_problem

DATA_KINDS = {
    "jsonl": "nemo_care.data.jsonl",
    "miniature": "nemo_care.data.jsonl",
    "seed_bench_r1": "nemo_care.data.seed_bench_r1",
    "video_r1": "nemo_care.data.video_r1",
}
"""Layout of a data set -> the module whose `parse` converts a record of it to a sample (`Parse` in
data/annotations.py)."""


@dataclass
class VideoConfig:
    """How videos become patches."""

    fps: float = 2.0
    """Frames per second of video, within the next two bounds."""
    min_frames: int = 4
    """Lower bound for the frames of a short video, as far as it has them; always an even number."""
    max_frames: int = 16
    """Upper bound for the frames of a long video, spread evenly."""
    min_pixels: int = 3136
    """Smallest number of pixels of a frame (4 * 28 * 28)."""
    max_pixels: int = 100352
    """Largest number of pixels of a frame (128 * 28 * 28)."""


@dataclass
class ImageConfig:
    """Bounds of an image's size."""

    min_pixels: int = 3136
    """Smallest number of pixels of an image (4 * 28 * 28)."""
    max_pixels: int = 401408
    """Largest number of pixels of an image (512 * 28 * 28)."""


@dataclass
class SourceConfig:
    """One data set of a mixture."""

    kind: str = "jsonl"
    """As in data.train.kind."""
    root: str = MISSING
    """Directory that the paths in the annotations are relative to."""
    annotations: str = "train.jsonl"
    """File relative to root."""
    weight: float = 1.0
    """Share of an epoch's prompts, relative to the remaining sources; above 0."""


@dataclass
class TrainDataConfig:
    """Training prompts: one data set, or a mixture."""

    kind: str = "jsonl"
    """jsonl: one JSON object per line; miniature: the same, created if missing; seed_bench_r1: as
    published; video_r1: as published, also for general video benchmarks."""
    root: str | None = None
    """Directory that the paths in the annotations are relative to; required without sources."""
    annotations: str = "train.jsonl"
    """File relative to root."""
    sources: list[SourceConfig] | None = None
    """Data sets to mix, each with kind, root, annotations and weight; replaces the three keys
    above. An epoch has as many prompts as all sources together have samples. Each source's share is
    weight / sum of weights, in whole prompts by largest remainder. A source uses all of its samples
    once before it repeats any, and continues in the next epoch where it stopped."""
    shuffle: bool = True
    """Draw a new order for each epoch; false: the files' order, sources spread evenly."""


@dataclass
class ValidationDataConfig:
    """Validation prompts, by level."""

    kind: str = "jsonl"
    """As in data.train.kind."""
    root: str | None = None
    """Directory that the paths in the annotations are relative to; required with annotations."""
    annotations: dict[str, str] | None = None
    """Level name -> file relative to root; null: no validation."""
    samples_per_level: int | None = None
    """Number of samples to use per level; null: all."""
    max_frames: int | None = None
    """Replaces data.video.max_frames; null: as in training."""


@dataclass
class DataConfig:
    """The source and the form of prompts."""

    train: TrainDataConfig = field(default_factory=TrainDataConfig)
    validation: ValidationDataConfig = field(default_factory=ValidationDataConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    prompt_template: str | None = None
    """Text of a prompt with {question}, {options} and {answer_hint}; null: the built-in text."""
    max_prompt_tokens: int = 16384
    """Longer prompts are skipped and listed."""
    max_skipped_fraction: float = 0.05
    """The run stops if a larger share of a data set can't be used: bad lines of its annotations,
    media that can't be read, prompts that are too long."""
    workers: int = 2
    """Decoding processes per model replica, which decode the next step's media during this one; 0:
    decode between the steps, without the two limits below."""
    prefetch_steps: int = 1
    """Number of steps whose media are decoded ahead and kept in memory."""
    seconds_per_sample: float = 60.0
    """Prompts whose media take longer to decode are skipped and listed."""
    worker_memory_gib: float = 8.0
    """Memory limit of one decoding process; a prompt that needs more is skipped and listed."""
    cache: str | None = None
    """Folder of a cache of decoded frames, which runs and ranks may share; null: no cache."""
    cache_gib: float = 64.0
    """Size limit of that folder; the frames that were least recently used are removed beyond it."""


def for_validation(data: DataConfig) -> DataConfig:
    """Return the same keys, with data.validation.max_frames as data.video.max_frames."""
    max_frames = data.validation.max_frames
    if max_frames is None:
        return data
    return replace(data, video=replace(data.video, max_frames=max_frames))


def check_data(data: DataConfig) -> None:
    """Check the keys under `data` against each other; their ranges are in schema.py."""
    if data.prompt_template is not None:
        fields = ("question", "options", "answer_hint")
        problem = template_problem(data.prompt_template, fields, fields[:1])
        if problem:
            raise InputError(
                f"data.prompt_template: {problem}; use {{question}}, {{options}} and "
                "{answer_hint}, the first at least, and double every brace that is text: {{ and }}"
            )
    most = {"data.video": data.video.max_frames, "data.validation": data.validation.max_frames}
    for block, max_frames in most.items():
        if max_frames is not None and data.video.min_frames > max_frames:
            raise InputError(f"data.video.min_frames is larger than {block}.max_frames")
    for name, size in (("video", data.video), ("image", data.image)):
        if size.min_pixels > size.max_pixels:
            raise InputError(f"data.{name}.min_pixels is larger than data.{name}.max_pixels")
    if data.validation.annotations and data.validation.root is None:
        raise InputError(
            "data.validation.root has no value: give the directory of "
            "data.validation.annotations, or set annotations to null"
        )
    if data.train.sources is None:
        return
    if not data.train.sources:
        raise InputError("data.train.sources is empty: name a source, or set it to null")
    for number, source in enumerate(data.train.sources):
        key = f"data.train.sources[{number}]"
        if source.kind not in DATA_KINDS:
            raise InputError(f"{key}.kind={source.kind}: choose {' or '.join(DATA_KINDS)}")
        if not (source.weight > 0 and math.isfinite(source.weight)):
            raise InputError(f"{key}.weight={source.weight}: must be a number above 0")
