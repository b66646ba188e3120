"""Explain in one line why a recipe can't be composed, with the nearest valid names."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf

from nemo_care.recipe.schema import Recipe


def all_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Return every dotted key of a configuration, parents before their children."""
    keys: list[str] = []
    for name in map(str, config):
        key = prefix + name
        keys.append(key)
        child = config._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            keys += all_keys(child, key + ".")
    return keys


def names_in(folders: Iterable[Path]) -> list[str]:
    """Return the recipes in these folders, without the package's base recipe."""
    return sorted({file.stem for folder in folders for file in folder.glob("*.yaml")} - {"base"})


def explain(error: Exception, arguments: Sequence[str], folders: Sequence[Path]) -> str:
    """Explain what is wrong with a command line or the files that it names, with the remedy.

    `folders` are searched for recipes.
    """
    from hydra.errors import MissingConfigException

    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        return _missing_file(error.missing_cfg_file, error.options or [], folders)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem_mark.name}:{error.problem_mark.line + 1}: {error.problem}"
    groups = _groups(folders)
    known = [*all_keys(OmegaConf.structured(Recipe)), *groups]
    for argument in arguments:
        name, equals, _ = argument.lstrip("+~").partition("=")
        if equals and not name.startswith(("-", "hydra")) and name not in known:
            parents = [parent for parent in known if name.startswith(parent + ".")]
            if not (parents and parents[-1] in free_form_keys()):
                return f"unknown recipe key {name}{_nearest(name, known)}"
    texts = list(_texts(error))
    # OmegaConf adds full_key if it has the key; Hydra adds In 'FILE' if a file is at fault.
    text = next((said for said in texts if "full_key: " in said), texts[-1])
    file, key = re.search("^In '(.+?)'", text), re.search(r"full_key: (\S+)", text)
    if key is None:
        return " ".join(text.split())
    where = f"{file[1]}.yaml: " if file else ""
    if file and _lacks_package(file[1], key[1]):
        return (
            f"{where}begin this file with the line `# @package _global_`: its keys are full paths"
        )
    if key[1] in known:
        detail = text.split("composing config:")[-1].split("full_key:")[0]
        return f"{where}{key[1]}: {' '.join(detail.split())}"
    return f"{where}unknown recipe key {key[1]}{_nearest(key[1], known)}"


def _texts(error: BaseException | None) -> Iterator[str]:
    """Yield the messages of an error and its causes."""
    while error is not None:
        yield str(error)
        error = error.__cause__


def _groups(folders: Iterable[Path]) -> list[str]:
    """Return the names of the groups of recipe files, such as data and layout."""
    found = {file.parent.name for folder in folders for file in folder.glob("*/*.yaml")}
    return sorted(found - {"studies"})  # these are not recipes, see nemo_care/experiments/


def _missing_file(name: str, options: Sequence[str], folders: Sequence[Path]) -> str:
    group, _, option = name.rpartition("/")
    if not group:
        names = names_in(folders)
        nearest = _nearest(name, names) or f"; recipes: {', '.join(names)}"
        return f"there is no recipe {name}{nearest}"
    if not options:
        return f"{name}: there is no group {group}; groups: {', '.join(_groups(folders))}"
    return f"{group}={option}: choose {' or '.join(options)}"


def _nearest(name: str, known: Sequence[str]) -> str:
    """Return the valid names nearest to a mistyped one, as the end of a sentence."""
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {', '.join(nearest)}?" if nearest else ""


def _lacks_package(file: str, key: str) -> bool:
    """Whether a group's file, such as data/mine, has full keys but no `@package _global_`.

    Hydra then reads them as keys below the group."""
    group = file.rpartition("/")[0]
    top = [name for name in all_keys(OmegaConf.structured(Recipe)) if "." not in name]
    return bool(group) and (key == group or key.split(".")[:2] in [[group, name] for name in top])


def free_form_keys() -> list[str]:
    """Return the keys that hold a dictionary with names of the user's choice."""
    return list(_free_form(Recipe, ""))


def _free_form(schema: type, prefix: str) -> Iterator[str]:
    hints = get_type_hints(schema)
    for field in fields(schema):
        name, hint = prefix + field.name, hints[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield from _free_form(hint, name + ".")
        elif dict in (get_origin(hint), *map(get_origin, get_args(hint))):
            yield name
