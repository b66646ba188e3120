"""The settings that an evaluation's rows depend on, and that a resumed evaluation must keep.

Settings that can't change a row (devices, layout, batch sizes, an endpoint's address, retries) are
not included.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from nemo_care.data.prompts import DEFAULT_TEMPLATE
from nemo_care.evaluation.judges import judge_class
from nemo_care.files.json_lines import Record
from nemo_care.recipe.schema import Recipe

_KEYS = (
    "trainer.seed",
    "model.precision.dtype",
    "algorithm.min_reasoning_words",
    "rollout.backend",
    "rollout.max_completion_tokens",
    "evaluation.temperature",
    "evaluation.top_p",
    "evaluation.untagged",
    "evaluation.judge",
    "evaluation.further_judges",
    "evaluation.forced_reasoning_probe",
    "evaluation.option_shuffle",
    "evaluation.peer_probe",
    "data.video",
    "data.image",
    "data.max_prompt_tokens",
    "data.validation",
)
_PEER_KEYS = ("rollout.temperature", "rollout.top_p")


def evaluation_settings(recipe: Recipe, models: Mapping[str, Any]) -> Record:
    """Return the settings as JSON values, by keys without nesting.

    `models` identifies the models, by the recipe's key that names them.
    """
    settings = {key: attrgetter(key)(recipe) for key in _KEYS}
    for judge in (recipe.evaluation.judge, *recipe.evaluation.further_judges):
        settings |= judge_class(judge).settings(recipe)
    if recipe.evaluation.peer_probe:
        settings |= {key: attrgetter(key)(recipe) for key in _PEER_KEYS}
    settings["data.prompt_template"] = recipe.data.prompt_template or DEFAULT_TEMPLATE
    validation = recipe.data.validation
    root = Path(validation.root or "").resolve()
    settings["data.validation"] = {
        **asdict(validation),
        "root": str(root),
        "content": {
            level: _digest(root / file) for level, file in (validation.annotations or {}).items()
        },
    }
    return _flat({**models, **settings})


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Record:
    flat: Record = {}
    for name, value in settings.items():
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
