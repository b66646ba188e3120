"""Small data sets in the exact layouts in which SEED-Bench-R1 and Video-R1 are published.

The files are real: mp4 videos, png and jpg images. The questions use words of the tiny tokenizer.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nemo_care.data.annotations import Annotations
from nemo_care.data.sources import read_source
from nemo_care.miniature.files import write_video

Fields = dict[str, Any]
SOURCES = ("EpicKitchens", "Ego4D")


def write_lines(file: Path, records: list[Any]) -> None:
    """Write one JSON object per line; a string is written as it is, for malformed lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("".join(line + "\n" for line in lines))


def write_noise(path: Path, seed: int) -> None:
    """Write a video of 8 frames or an image, 28 x 28 pixels, by the path's suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 28, 28, 3), dtype=np.uint8)
    if path.suffix == ".mp4":
        write_video(path, torch.from_numpy(pixels))
    else:
        Image.fromarray(pixels[0]).save(path)


def seed_bench_r1_record(number: int, *, training: bool) -> Fields:
    """Return a record with all fields of the published annotations; every fourth has no video."""
    name = f"P01_{number:02d}"
    progress = [{"narration_text": "open drawer", "start_frame": 36, "stop_frame": 105}]
    record = {
        "sample_id": number,
        "video_source": SOURCES[number % 2],
        "video_id": name,
        "task_goal": "store cereal",
        "question": "which way does the square move ?",
        "answer": f"right {number}",
        "current_observation_frame": 760,
        "task_progress_metadata": [] if number % 4 == 3 else progress,
        "video_basename": f"{name}_{number}.mp4",
        "current_observation_basename": f"{name}_{number}.png",
    }
    if training:
        return {**record, "negative_answers": ["left", "up", "down", "in", "from"]}
    choices = {"choice_a": "left", "choice_b": record["answer"], "choice_c": "up", "choice_d": "in"}
    return {**record, **choices, "golden_choice_idx": "B", "domain": "Hobbies"}


def write_seed_bench_r1(root: Path, *, train: int = 8, validation: int = 2) -> Path:
    """Write annotations, videos and images; return the data root."""
    everything = []
    for name, count in (("training_6k", train), *((f"validation_L{n}", validation) for n in "123")):
        first = len(everything)
        records = [
            seed_bench_r1_record(first + number, training=name == "training_6k")
            for number in range(count)
        ]
        write_lines(root / "annotations" / f"{name}.jsonl", records)
        everything += records
    for number, record in enumerate(everything):
        source = record["video_source"]
        write_noise(root / "images" / source / record["current_observation_basename"], number)
        if record["task_progress_metadata"]:
            write_noise(root / "videos" / source / record["video_basename"], number)
    return root


_SOLUTIONS = {
    "multiple choice": "B",
    "numerical": "3.14",
    "OCR": "left up",
    "free-form": "the square goes left",
    "regression": "42",
}


def video_r1_record(number: int) -> Fields:
    """Return a record with all fields of the published annotations; kinds and types alternate."""
    problem_type = list(_SOLUTIONS)[number % len(_SOLUTIONS)]
    data_type = "image" if number % 2 else "video"
    return {
        "problem_id": number,
        "problem": "which way does the disc move ?",
        "data_type": data_type,
        "problem_type": problem_type,
        "options": ["A. left", "B. right"] if problem_type == "multiple choice" else [],
        "process": "",
        "solution": f"<answer>{_SOLUTIONS[problem_type]}</answer>",
        "path": f"./{data_type}s/{number}.{'jpg' if number % 2 else 'mp4'}",
        "data_source": "noise",
    }


def write_video_r1(root: Path, *, count: int = 10, name: str = "Video-R1-260k.json") -> Path:
    """Write annotations (an array, or lines by the suffix) and media; return the data root."""
    records = [video_r1_record(number) for number in range(count)]
    for number, record in enumerate(records):
        write_noise(root / record["path"], number)
    if name.endswith(".jsonl"):
        write_lines(root / name, records)
    else:
        (root / name).write_text(json.dumps(records, indent=1))
    return root


def read_made(root: Path, file: str, *, kind: str = "jsonl", seed: int = 1) -> Annotations:
    """Read annotations as training does."""
    return read_source(kind, root, file, seed=seed, for_training=True)
