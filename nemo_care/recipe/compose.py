"""Compose a checked `Recipe` from a recipe's name and overrides.

Composition follows NeMo's `hydra_runner`, with the `recipes/` folder as search path, overrides as
`key=value`, and the user's own folder with `--config-path`. It uses Hydra alone, with the same
result: NeMo takes seconds to import, and no command needs more of it at this point.
"""

import operator
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import fields
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_care.errors import InputError
from nemo_care.files.json_lines import read_text
from nemo_care.recipe.arguments import is_opening, openings, read_arguments
from nemo_care.recipe.explain import all_keys, explain, names_in
from nemo_care.recipe.schema import Recipe, check_recipe

_RESTORE = "correct it, or restore it from the recipe.yaml of a checkpoint"
SCHEMA_NAME = "nemo_care_schema"
_PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Return the folder of recipes: beside the package in a checkout, inside it when installed."""
    checkout = _PACKAGE.parent / "recipes"
    return checkout if checkout.is_dir() else _PACKAGE / "recipes"


def recipe_names() -> list[str]:
    """Return the recipes that come with the package, without the base that they inherit."""
    return names_in([recipes_folder()])


@cache
def _register() -> None:
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    store.store(name=SCHEMA_NAME, node=Recipe)
    for group, content in openings():
        store.store(group=group, name="yes", node=content, package="_global_")
    OmegaConf.register_new_resolver("package_path", _package_path, replace=True)
    OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
    OmegaConf.register_new_resolver("epoch_steps", _epoch_steps, replace=True)
    # NeMo provides these to recipes, and replaces them when it is imported.
    OmegaConf.register_new_resolver("multiply", operator.mul, replace=True)
    OmegaConf.register_new_resolver("sum", operator.add, replace=True)


def _package_path(name: str) -> str:
    """Return the path of a file that comes with the package, such as the miniature's checkpoint."""
    return str(_PACKAGE / name)


def _run_name() -> str:
    """Return the recipe's name and the groups chosen on the command line, such as an ablation.

    Layout and rollout are omitted: a run resumes in its directory with any of them.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    choices = {
        name: file
        for name, file in hydra.runtime.choices.items()
        if name not in ("layout", "rollout") and not is_opening(name)
    }
    given = [override.lstrip("+").partition("=")[0] for override in hydra.overrides.task]
    chosen = [str(choices[name]) for name in given if name in choices]
    return "_".join([Path(str(hydra.job.config_name)).stem, *chosen])


def _epoch_steps(samples: int, prompts_per_step: int) -> int:
    """Return the steps until each of `samples` samples has been a prompt."""
    return -(-samples // max(prompts_per_step, 1))  # check_recipe rejects less than 1


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """Set sys.argv, which Hydra reads, and let it raise instead of exiting."""
    from hydra._internal.hydra import Hydra

    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra would compose everything once more, only to read whether this is a multirun, which
    # read_arguments rejects. Without an answer it sets hydra.mode=RUN.
    get_mode, Hydra.get_mode = Hydra.get_mode, lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        sys.argv, Hydra.get_mode = argv, get_mode  # type: ignore[method-assign]
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def to_recipe(config: DictConfig) -> Recipe:
    """Convert a composed configuration to the schema and check it.

    Raises:
        InputError: an unknown key, a wrong type, a missing value or one out of range.
    """
    try:
        # Plain values only: Hydra's `+key=value` can have opened a node of the schema, and a merge
        # would copy the opened node.
        plain = OmegaConf.create(OmegaConf.to_container(config))
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), plain)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise InputError(f"{missing[0]} has no value: give it in the recipe or as an override")
        OmegaConf.resolve(merged)
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(explain(error, [], [recipes_folder()])) from error
    assert isinstance(recipe, Recipe)
    check_recipe(recipe)
    return recipe


def compose_recipe(arguments: Sequence[str]) -> Recipe | None:
    """Compose and check the recipe of a command line.

    Args:
        arguments: the arguments of `nemo-care train`: `--config-name NAME`, `--config-path DIR`,
            `key=value`, and Hydra's own flags.

    Returns:
        The recipe, or None if Hydra only printed something (`--cfg job`).

    Raises:
        InputError: no such recipe, an unknown key, a value of the wrong type or out of range.
    """
    import hydra
    from hydra.errors import HydraException

    _register()
    read = read_arguments(arguments, recipes_folder())
    composed: list[DictConfig] = []

    @hydra.main(version_base=None, config_path=str(recipes_folder()))
    def capture(config: DictConfig) -> None:
        # Inside this function, because run names need Hydra's state.
        OmegaConf.resolve(config)
        composed.append(config)

    noise = StringIO()
    try:
        # Hydra repeats its exception's message on stderr.
        with _command_line(read.for_hydra), redirect_stderr(noise):
            capture()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(explain(error, arguments, read.folders)) from error
    except SystemExit as error:
        if error.code not in (0, None):
            lines = noise.getvalue().strip().splitlines() or ["the command line is not understood"]
            raise InputError(lines[-1]) from error
        return None
    return to_recipe(composed[0]) if composed else None


def load_recipe_file(file: Path) -> DictConfig:
    """Read a run's recipe.yaml, unchecked.

    Raises:
        InputError: the file can't be read, or is not YAML with keys.
    """
    text = read_text(file, remedy=_RESTORE)
    try:
        config = OmegaConf.load(StringIO(text))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{file}:{line}: not valid YAML ({error.problem}); {_RESTORE}") from error
    except (yaml.YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{file}: not a recipe ({cause}); {_RESTORE}") from error
    if not isinstance(config, DictConfig):
        raise InputError(f"{file}: not a recipe; {_RESTORE}")
    return config


def read_recipe(file: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a resolved recipe from a run directory, with `overrides` (key=value).

    Raises:
        InputError: the file is missing or is not a recipe, or an override does not fit.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; give a run directory with its recipe.yaml")
    config = load_recipe_file(file)
    # A run writes every part; a missing one would silently get the schema's defaults.
    cut = [part.name for part in fields(Recipe) if part.name not in config]
    if cut:
        raise InputError(f"{file}: cut short, {cut[0]} is missing; {_RESTORE}")
    try:
        recipe = to_recipe(config)
    except InputError as error:
        raise InputError(f"{file}: {error}") from error
    if not overrides:
        return recipe
    for override in overrides:
        if "=" not in override:
            raise InputError(f"{override}: an override is key=value")
    try:
        config.merge_with_dotlist(list(overrides))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(explain(error, list(overrides), [recipes_folder()])) from error
    return to_recipe(config)


def recipe_changes(old: Recipe, new: Recipe) -> dict[str, list[Any]]:
    """Return old and new value, as in JSON, of each key in which two recipes differ."""
    before, after = (OmegaConf.structured(recipe) for recipe in (old, new))
    changes = {}
    for key in all_keys(after):
        values = [OmegaConf.select(config, key) for config in (before, after)]
        if values[0] != values[1] and not isinstance(values[1], DictConfig):
            changes[key] = [
                OmegaConf.to_container(value) if isinstance(value, Container) else value
                for value in values
            ]
    return changes
