"""The content of a run's annotations files, so that a resumed run notices a changed one."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from nemo_care.data.annotations import Annotations
from nemo_care.data.mixing import TrainingData

Fingerprints = dict[str, dict[str, Any]]


def fingerprints(training: TrainingData, levels: Mapping[str, Annotations]) -> Fingerprints:
    """Return `file`, `sha256` and `lines` of each annotations file, by its use in the recipe.

    The keys are `training 0`, `training 1`, ... in the order of the sources, and `validation
    LEVEL`. Samples that were not read from a file have no fingerprint.
    """
    read = {f"training {number}": source for number, source in enumerate(training.sources)}
    read |= {f"validation {level}": annotations for level, annotations in levels.items()}
    return {
        use: asdict(annotations.fingerprint)
        for use, annotations in read.items()
        if annotations.fingerprint is not None
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each annotations file that changed since an earlier step.

    Files in only one of the two come from a changed recipe, and are ignored.
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
