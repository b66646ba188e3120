"""Check every value of a recipe, whatever its key: numbers are finite, texts not empty.

Ranges and choices of single keys are in schema.py.
"""

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from nemo_care.errors import InputError

# Arguments of loggers, which check themselves what can be empty.
_FREE_TEXT = ("exp_manager.wandb_logger_kwargs", "exp_manager.mlflow_logger_kwargs")


def check_values(recipe: Any) -> None:
    """Reject NaN, infinity and empty texts, at any depth of the recipe.

    A NaN passes every comparison with a bound. An empty text is mostly an unset shell variable, and
    would mean the working directory, the built-in text or a different model.
    """
    for key, value in _values(recipe, ""):
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{key}={value}: must be a finite number")
        if isinstance(value, str) and not value.strip() and not key.startswith(_FREE_TEXT):
            raise InputError(
                f"{key} is empty: give it a value, or omit it (is a shell variable not set?)"
            )


def _values(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield every value except blocks, lists and mappings, with its key; also keys of mappings."""
    if is_dataclass(value):
        for field in fields(value):
            yield from _values(getattr(value, field.name), f"{key}.{field.name}".lstrip("."))
    elif isinstance(value, dict):
        for name, item in value.items():
            yield f"{key} (a name in it)", name
            yield from _values(item, f"{key}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _values(item, f"{key}[{number}]")
    else:
        yield key, value
