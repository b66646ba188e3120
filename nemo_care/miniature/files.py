"""The miniature as files: real mp4 videos, and one JSON object per question."""

import json
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nemo_care.data.samples import Sample
from nemo_care.data.video_writer import write_video
from nemo_care.errors import InputError
from nemo_care.miniature.world import (
    FRAMES_PER_SECOND,
    LEVELS,
    Question,
    draw_level,
    draw_wrong_directions,
)
from nemo_care.process.os_errors import naming

WORLD_FILE = "world.json"
# Raise it when the same seed gives different files.
WORLD_VERSION = 1
TRAIN_FILE = "train.jsonl"
VALIDATION_FILES = {level: f"validation_{level}.jsonl" for level in LEVELS}
TRAIN_QUESTIONS = 1600
VALIDATION_QUESTIONS = 256
_DRAWN_AT_ONCE = 64


def write_world(
    root: str | Path,
    *,
    train: int = TRAIN_QUESTIONS,
    validation: int = VALIDATION_QUESTIONS,
    seed: int = 0,
) -> None:
    """Write `train` training questions, and `validation` questions per level, with their videos.

    The directory appears only when complete. The same arguments give the same files.

    Raises:
        InputError: `root` exists already.
    """
    root = Path(root)
    if root.exists():
        raise InputError(f"{root}: exists already; remove it or choose another directory")
    with _complete_directory(root) as partial:
        _write_files(partial, train, validation, seed)


def ensure_world(
    root: str | Path,
    *,
    train: int = TRAIN_QUESTIONS,
    validation: int = VALIDATION_QUESTIONS,
    seed: int = 0,
) -> None:
    """Write the world unless the same one already exists.

    Raises:
        InputError: `root` contains a different world, or other files.
    """
    root = Path(root)
    if not root.exists():
        try:
            write_world(root, train=train, validation=validation, seed=seed)
        except (OSError, InputError):
            if not root.exists():
                raise
        else:
            return
    # It existed before, or another process was faster: either way it must be the same.
    expected = _description(train, validation, seed)
    try:
        found = json.loads((root / WORLD_FILE).read_text())
    except (OSError, ValueError):
        raise InputError(
            f"{root}: no world of the miniature in it ({WORLD_FILE} is missing or broken); "
            "remove it or choose another directory"
        ) from None
    if found != expected:
        raise InputError(
            f"{root / WORLD_FILE}: another world is there ({json.dumps(found)}, wanted "
            f"{json.dumps(expected)}); remove the directory or choose another"
        )


@contextmanager
def _complete_directory(root: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `root` when the block ends without an error."""
    root.parent.mkdir(parents=True, exist_ok=True)
    # Not from tempfile, whose directories are private to the user.
    partial = root.with_name(f".{root.name}.{secrets.token_hex(4)}")
    partial.mkdir()
    try:
        with naming(root):
            yield partial
            partial.rename(root)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_files(directory: Path, train: int, validation: int, seed: int) -> None:
    (directory / "videos").mkdir()
    total = train + validation * len(LEVELS)
    with tqdm(total=total, desc="miniature videos", unit="video") as progress:
        parts = [("train", "L1", TRAIN_FILE, train)]
        parts += [(level, level, VALIDATION_FILES[level], validation) for level in LEVELS]
        for number, (name, level, file_name, count) in enumerate(parts):
            # One generator per file: validation does not depend on the number of training
            # questions.
            generator = torch.Generator().manual_seed(1000 * (seed + 1) + number)
            with (directory / file_name).open("w") as lines:
                for sample, frames in _draw_samples(name, level, count, generator):
                    write_video(directory / sample.videos[0], frames, FRAMES_PER_SECOND)
                    lines.write(json.dumps(_record(sample)) + "\n")
                    progress.update()
    description = json.dumps(_description(train, validation, seed), indent=2)
    (directory / WORLD_FILE).write_text(description + "\n")


def _description(train: int, validation: int, seed: int) -> dict[str, int]:
    return {"version": WORLD_VERSION, "seed": seed, "train": train, "validation": validation}


def _draw_samples(
    name: str, level: str, count: int, generator: torch.Generator
) -> Iterator[tuple[Sample, Tensor]]:
    """Draw samples with video paths relative to the world, and their frames [T, H, W, 3]."""
    for first in range(0, count, _DRAWN_AT_ONCE):
        scenes, questions = draw_level(level, min(_DRAWN_AT_ONCE, count - first), generator)
        wrong = draw_wrong_directions(questions, generator)
        for index, (question, claimed) in enumerate(zip(questions, wrong, strict=True)):
            sample_id = f"{name}_{first + index:05d}"
            probe = None if name == "train" else claimed
            yield _sample(sample_id, question, probe), scenes.frames[index]


def _sample(sample_id: str, question: Question, claimed: str | None) -> Sample:
    """Convert a question; `claimed` is the direction of its forced reasoning, if any."""
    return Sample(
        sample_id=sample_id,
        question=question.text,
        solution=question.solution,
        videos=(Path("videos") / f"{sample_id}.mp4",),
        options=question.options,
        forced_reasoning="" if claimed is None else question.reasoning(claimed, template=0),
        forced_answer="" if claimed is None else question.implied_letter(claimed),
    )


def _record(sample: Sample) -> dict[str, object]:
    """Convert a sample to a JSON object."""
    record: dict[str, object] = {
        "id": sample.sample_id,
        "videos": [path.as_posix() for path in sample.videos],
        "question": sample.question,
        "options": dict(sample.options),
        "solution": sample.solution,
        "problem_type": sample.problem_type,
    }
    if sample.forced_reasoning:
        record["forced_reasoning"] = sample.forced_reasoning
        record["forced_answer"] = sample.forced_answer
    return record
