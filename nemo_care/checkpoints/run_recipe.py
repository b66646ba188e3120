"""Read the recipe of a run: its own file or, if that is damaged, a checkpoint's."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from nemo_care.checkpoints.store import list_checkpoints
from nemo_care.errors import InputError
from nemo_care.process.screen import say
from nemo_care.recipe.compose import read_recipe
from nemo_care.recipe.schema import Recipe

_RECIPE = "recipe.yaml"


def recipe_of_run(
    run: Path, checkpoints: Sequence[Path] | None = None, overrides: Sequence[str] = ()
) -> Recipe:
    """Return a run's recipe: its recipe.yaml or, if that can't be used, a checkpoint's.

    Args:
        run: the run directory.
        checkpoints: candidates, the best first; None: the run's, newest first.
        overrides: key=value.

    Raises:
        InputError: no recipe can be used, or an override does not fit; the message is about
        recipe.yaml.
    """
    file = run / _RECIPE
    try:
        read_recipe(file)
    except InputError as unusable:
        file = _recipe_of_a_checkpoint(run, checkpoints, unusable)
    return read_recipe(file, overrides)


def _recipe_of_a_checkpoint(
    run: Path, checkpoints: Sequence[Path] | None, unusable: InputError
) -> Path:
    """Return the first usable recipe.yaml of a checkpoint, and report it on stderr."""
    if checkpoints is None:
        checkpoints = list_checkpoints(run / "checkpoints")[::-1]
    for checkpoint in checkpoints:
        with suppress(InputError):
            read_recipe(checkpoint / _RECIPE)
            say(f"{unusable}\nusing the recipe of {checkpoint} instead", file=sys.stderr)
            return checkpoint / _RECIPE
    raise unusable
