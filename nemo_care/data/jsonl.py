"""Our own data layout: one JSON object a line.

    {"id": "42", "question": "...", "solution": "B", "problem_type": "multiple choice",
     "videos": ["videos/42.mp4"], "images": [], "options": {"A": "left", "B": "right"}}

`question` and `solution` are required. Paths are relative to the data root and must stay in it.
`forced_reasoning` and `forced_answer` are for the forced-reasoning probe (see Sample).
"""

import json
from pathlib import Path
from typing import Any

from nemo_care.data.samples import Sample
from nemo_care.errors import InputError
from nemo_care.objective.rewards import PROBLEM_TYPES

_TEXT_KEYS = ("id", "question", "solution", "problem_type", "forced_reasoning", "forced_answer")
_KEYS = {*_TEXT_KEYS, "videos", "images", "options"}


def _media(record: dict[str, Any], key: str, root: Path, where: str) -> tuple[Path, ...]:
    names = record.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f'{where}: "{key}" must be a list of paths')
    paths = tuple((root / name).resolve() for name in names)
    for name, path in zip(names, paths, strict=True):
        if not path.is_relative_to(root):
            raise InputError(f'{where}: the path "{name}" leaves the data root')
    return paths


def _parse(line: str, root: Path, where: str, number: int) -> Sample:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON ({error.msg}); mend or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: a line must be a JSON object")
    for key in ("question", "solution"):
        if not record.get(key):
            raise InputError(f'{where}: "{key}" is missing')
    unknown = sorted(set(record) - _KEYS)
    if unknown:
        raise InputError(
            f'{where}: unknown field "{unknown[0]}"; known: {", ".join(sorted(_KEYS))}'
        )
    for key in _TEXT_KEYS:
        if not isinstance(record.get(key, ""), str):
            raise InputError(f'{where}: "{key}" must be text')
    kind = record.get("problem_type", "multiple choice")
    if kind not in PROBLEM_TYPES:
        known = ", ".join(PROBLEM_TYPES)
        raise InputError(f'{where}: unknown "problem_type" {kind}; known: {known}')
    options = record.get("options", {})
    if not isinstance(options, dict) or not all(isinstance(o, str) for o in options.values()):
        raise InputError(f'{where}: "options" must map a letter to its text')
    return Sample(
        sample_id=record.get("id", str(number)),
        question=record["question"],
        solution=record["solution"],
        problem_type=kind,
        videos=_media(record, "videos", root, where),
        images=_media(record, "images", root, where),
        options=options,
        forced_reasoning=record.get("forced_reasoning", ""),
        forced_answer=record.get("forced_answer", ""),
    )


def read_jsonl(root: str | Path, annotations: str) -> list[Sample]:
    """All samples of `root/annotations`, in the file's order.

    Raises:
        InputError: the file is missing or empty, or a line is malformed (named by its number).
    """
    folder = Path(root).resolve()
    file = folder / annotations
    if not file.is_file():
        raise InputError(f"{file}: no such annotations file; check data.*.root and annotations")
    samples = []
    for number, line in enumerate(file.read_text().split("\n"), start=1):
        if line.strip():
            samples.append(_parse(line, folder, f"{file}:{number}", number))
    if not samples:
        raise InputError(f"{file}: holds no samples")
    return samples
