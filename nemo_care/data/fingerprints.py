"""What the annotations files of a run hold, so that a resumed run notices a changed one."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_care.data.sources import training_sources
from nemo_care.recipe.data import DataConfig

Fingerprints = dict[str, dict[str, Any]]


def fingerprints(data: DataConfig) -> Fingerprints:
    """`file`, `sha256` and `lines` of each annotations file, by what the recipe uses it for.

    The names are `training 0`, `training 1`, ... in the order of the sources, and `validation
    LEVEL`.
    """
    files = {
        f"training {number}": Path(source.root) / source.annotations
        for number, source in enumerate(training_sources(data))
    }
    for level, name in (data.validation.annotations or {}).items():
        files[f"validation {level}"] = Path(str(data.validation.root)) / name
    return {use: _fingerprint(file) for use, file in files.items()}


def _fingerprint(file: Path) -> dict[str, Any]:
    digest, lines = hashlib.sha256(), 0
    with file.open("rb") as opened:
        for line in opened:
            digest.update(line)
            lines += 1
    return {"file": str(file), "sha256": digest.hexdigest(), "lines": lines}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One line for each annotations file that is not what it was at an earlier step.

    Files that only one of the two has come from a changed recipe.
    """
    for use in sorted(before.keys() & now.keys()):
        old, new = before[use], now[use]
        if old["sha256"] == new["sha256"]:
            continue
        what = (
            "from here on the order of the prompts and the samples themselves differ from a run "
            "that had this file from the start"
            if use.startswith("training")
            else "results from here on can't be compared with earlier ones"
        )
        yield (
            f"{new['file']} ({use.partition(' ')[0]} data) changed since the checkpoint was "
            f"written: {old['lines']} lines then, {new['lines']} now; {what}"
        )
