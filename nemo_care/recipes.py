"""From a recipe's name and overrides to a checked `Recipe`.

Composition is NeMo's: `hydra_runner` with the `recipes/` folder as search path, overrides as
`key=value`, and the user's own folder with `--config-path`. NeMo takes seconds to import, so a
command that needs nothing else of it composes with Hydra alone, to the same recipe.
"""

import difflib
import operator
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_care.config import Recipe, check_recipe
from nemo_care.errors import InputError

SCHEMA_NAME = "nemo_care_schema"
_PACKAGE = Path(__file__).resolve().parent
# Hydra is to compose, and to leave folders and logs alone; NeMo's runner sets the last three too.
_HYDRA_OVERRIDES = (
    "hydra.job.chdir=false",
    "hydra.output_subdir=null",
    "hydra/job_logging=stdout",
    "hydra.run.dir=.",
)


def recipes_folder() -> Path:
    """Where the recipes lie: beside the package in a checkout, inside it when installed."""
    checkout = _PACKAGE.parent / "recipes"
    return checkout if checkout.is_dir() else _PACKAGE / "recipes"


def recipe_names() -> list[str]:
    """The recipes that come with the package, without the base that they inherit."""
    return sorted(file.stem for file in recipes_folder().glob("*.yaml") if file.stem != "base")


def _register() -> None:
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=SCHEMA_NAME, node=Recipe)
    # The path of a file that comes with the package, such as the miniature's checkpoint.
    OmegaConf.register_new_resolver("package_path", lambda name: str(_PACKAGE / name), replace=True)


@contextmanager
def _command_line(arguments: Sequence[str]) -> Iterator[None]:
    """hydra_runner reads sys.argv and, asked to, raises instead of exiting."""
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [argv[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = argv
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _own_folder(arguments: Sequence[str]) -> list[str]:
    """`--config-path DIR` adds a folder to the search path instead of replacing ours."""
    result: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in ("--config-path", "-cp"):
            result.append(argument)
            continue
        folder = Path(value if equals else next(rest, "")).resolve()
        if not folder.is_dir():
            raise InputError(f"--config-path {folder}: no such folder")
        result += ["--config-dir", str(folder)]
    return result


def _all_keys(config: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name in map(str, config):
        key = prefix + name
        keys.append(key)
        child = config._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            keys += _all_keys(child, key + ".")
    return keys


def _hint(key: str, known: list[str]) -> str:
    """The valid keys nearest to a mistyped one; nothing for a valid key."""
    nearest = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(nearest)}?" if nearest and key not in known else ""


def _explain(error: Exception, arguments: Sequence[str]) -> str:
    """One line for a composition error: the key, and the nearest valid ones for a typo."""
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None:
        chain.append(current)
        current = current.__cause__
    message = " ".join(str(chain[-1]).split())
    known = _all_keys(OmegaConf.structured(Recipe))
    for argument in arguments:
        key, equals, _ = argument.lstrip("+~").partition("=")
        if equals and not key.startswith(("-", "hydra")) and key not in known:
            parents = [name for name in known if key.startswith(name + ".")]
            if parents and _is_free_form(parents[-1]):
                continue
            return f"unknown recipe key {key}{_hint(key, known)}"
    for item in chain:
        full_key = getattr(item, "full_key", None)
        if full_key:
            detail = message.split(" full_key")[0]
            return f"{full_key}: {detail}{_hint(str(full_key), known)}"
    return message


def _is_free_form(key: str) -> bool:
    """Whether a key holds a dictionary with names of the user's choice."""
    node: Any = OmegaConf.structured(Recipe)
    for part in key.split("."):
        node = node._get_node(part)
    return isinstance(node, DictConfig) and node._metadata.object_type is dict


def to_recipe(config: DictConfig) -> Recipe:
    """Check a composed configuration against the schema.

    Raises:
        InputError: an unknown key, a wrong type, a missing value or one out of range.
    """
    try:
        # Plain values only: Hydra's `+key=value` may have opened a node of the schema, and a merge
        # would take the opened node over.
        plain = OmegaConf.create(OmegaConf.to_container(config))
        merged = OmegaConf.merge(OmegaConf.structured(Recipe), plain)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise InputError(f"{missing[0]} has no value: give it in the recipe or as an override")
        OmegaConf.resolve(merged)
        recipe = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise InputError(_explain(error, [])) from error
    assert isinstance(recipe, Recipe)
    check_recipe(recipe)
    return recipe


def _runner(with_nemo: bool) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Hydra's decorator for the function that gets the composed configuration."""
    folder = str(recipes_folder())
    if with_nemo:
        from nemo.core.config import hydra_runner

        return hydra_runner(config_path=folder)
    import hydra

    # The resolvers that NeMo offers to recipes; its own replace them.
    OmegaConf.register_new_resolver("multiply", operator.mul, replace=True)
    OmegaConf.register_new_resolver("sum", operator.add, replace=True)
    return hydra.main(version_base=None, config_path=folder)


def compose_recipe(arguments: Sequence[str], *, with_nemo: bool = True) -> Recipe | None:
    """Compose and check the recipe that a command line names.

    Args:
        arguments: as after `nemo-care train`: `--config-name NAME`, `--config-path DIR`,
            `key=value`, and Hydra's own flags.
        with_nemo: compose with NeMo's `hydra_runner`, or with Hydra alone.

    Returns:
        The recipe, or None where Hydra only printed something (`--cfg job`).

    Raises:
        InputError: no such recipe, an unknown key, a value of the wrong type or out of range.
    """
    from hydra.errors import HydraException

    _register()
    arguments = [*_own_folder(arguments), *_HYDRA_OVERRIDES]
    if not any(a.split("=")[0] in ("--config-name", "-cn") for a in arguments):
        raise InputError(f"--config-name is missing; recipes: {', '.join(recipe_names())}")
    composed: list[DictConfig] = []

    @_runner(with_nemo)
    def capture(config: DictConfig) -> None:
        composed.append(config)

    noise = StringIO()
    try:
        # Hydra repeats on stderr what its exception says.
        with _command_line(arguments), redirect_stderr(noise):
            capture()
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(_explain(error, arguments)) from error
    except SystemExit as error:
        if error.code not in (0, None):
            lines = noise.getvalue().strip().splitlines() or ["the command line is not understood"]
            raise InputError(lines[-1]) from error
        return None
    return to_recipe(composed[0]) if composed else None


def save_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def read_recipe(file: Path) -> Recipe:
    """A resolved recipe from a run directory.

    Raises:
        InputError: the file is missing or is not a recipe.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; give a run directory with its recipe.yaml")
    config = OmegaConf.load(file)
    if not isinstance(config, DictConfig):
        raise InputError(f"{file}: not a recipe")
    return to_recipe(config)


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """`key: old -> new` for each key in which two recipes differ."""
    before, after = (OmegaConf.structured(recipe) for recipe in (old, new))
    changes = []
    for key in _all_keys(after):
        values = [OmegaConf.select(config, key) for config in (before, after)]
        if values[0] != values[1] and not isinstance(values[1], DictConfig):
            changes.append(f"{key}: {values[0]} -> {values[1]}")
    return changes
