"""What the annotations files of a run hold, so that a resumed run notices a changed one."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from nemo_care.data.annotations import Annotations
from nemo_care.data.mixing import TrainingData

Fingerprints = dict[str, dict[str, Any]]


def fingerprints(training: TrainingData, levels: Mapping[str, Annotations]) -> Fingerprints:
    """`file`, `sha256` and `lines` of each annotations file, by what the recipe uses it for.

    The names are `training 0`, `training 1`, ... in the order of the sources, and `validation
    LEVEL`. Samples that were not read from a file have none.
    """
    read = {f"training {number}": source for number, source in enumerate(training.sources)}
    read |= {f"validation {level}": annotations for level, annotations in levels.items()}
    return {
        use: asdict(annotations.fingerprint)
        for use, annotations in read.items()
        if annotations.fingerprint is not None
    }


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
