"""The schema of a study: a YAML file with variants of a training recipe, seeds and what to show."""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING, OmegaConf, SCMode
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from nemo_care.errors import InputError
from nemo_care.experiments.training_runs import refuse_own_keys
from nemo_care.files.json_lines import read_text
from nemo_care.recipe.compose import recipes_folder

STUDIES = "studies"
# The first row of the tables, which is not a variant.
START = "start"
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_REMEDIES = {"trainer.seed": "seeds"}


@dataclass
class Variant:
    """A way to train."""

    title: str = ""
    """Its name in tables and figures; the variant's name if empty."""
    recipe: str = ""
    """Replaces the study's."""
    overrides: list[str] = field(default_factory=list)
    """Hydra overrides, applied after the study's; `+ablation=grpo` is one."""
    seeds: list[int] | None = None
    """Replaces the study's."""
    about: str = ""
    """A sentence for the reader."""


@dataclass
class Contrast:
    """A difference to show: left minus right, paired by seed."""

    left: str = MISSING
    right: str = MISSING
    about: str = ""
    """The question that it answers."""


@dataclass
class Study:
    """A study; `read_study` checks it."""

    title: str = MISSING
    recipe: str = MISSING
    """Name of a training recipe."""
    seeds: list[int] = field(default_factory=list)
    variants: dict[str, Variant] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    """Hydra overrides for all runs."""
    contrasts: list[Contrast] = field(default_factory=list)
    curves: list[str] = field(default_factory=list)
    """Names of the variants that are drawn over the training steps."""

    def seeds_of(self, name: str) -> list[int]:
        """Return a variant's seeds without duplicates."""
        own = self.variants[name].seeds
        return list(dict.fromkeys(self.seeds if own is None else own))

    def overrides_of(self, name: str) -> tuple[str, ...]:
        """Return all overrides of a variant's runs, without seed and run directory."""
        return (*self.overrides, *self.variants[name].overrides)

    def recipe_of(self, name: str) -> str:
        """Return the recipe of a variant's runs."""
        return self.variants[name].recipe or self.recipe

    def title_of(self, name: str) -> str:
        """Return a variant's name in tables and figures."""
        return self.variants[name].title or name


def studies_folders(config_dir: str | None) -> list[Path]:
    """Return the folders in which studies are searched, the user's own folder first.

    Raises:
        InputError: the folder does not exist.
    """
    folders = [recipes_folder() / STUDIES]
    if config_dir is None:
        return folders
    own = Path(config_dir)
    if not own.is_dir():
        raise InputError(f"--config-path {config_dir}: no such folder")
    return [own / STUDIES, own, *folders]


def find_study(name: str, config_dir: str | None = None) -> Path:
    """Find the file of a study.

    Raises:
        InputError: there is no study of this name.
    """
    folders = studies_folders(config_dir)
    for folder in folders:
        file = folder / f"{name}.yaml"
        if file.is_file():
            return file
    # The recipes of the user's folder are not studies.
    listed = [folder for folder in folders if folder.name == STUDIES]
    names = sorted({file.stem for folder in listed for file in folder.glob("*.yaml")})
    raise InputError(f"there is no study {name}; studies: {', '.join(names)}")


def read_study(file: Path) -> Study:
    """Read and check a study.

    Raises:
        InputError: an unknown key or name, a wrong type, or nothing to run.
    """
    try:
        given = yaml.safe_load(read_text(file, remedy="save it as UTF-8"))
        if not isinstance(given, dict):
            raise InputError(f"{file}: not a study; begin with title, recipe, seeds and variants")
        merged = OmegaConf.merge(OmegaConf.structured(Study), OmegaConf.create(_filled(given)))
        study = OmegaConf.to_container(
            merged, throw_on_missing=True, structured_config_mode=SCMode.INSTANTIATE
        )
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise InputError(f"{file}:{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{file}: not valid YAML ({' '.join(str(error).split())})") from error
    except OmegaConfBaseException as error:
        raise InputError(f"{file}: {_explained(error)}") from error
    assert isinstance(study, Study)
    try:
        _check(study)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None
    return study


def _filled(given: dict[Any, Any]) -> dict[Any, Any]:
    """Replace a variant without a value (`care:`) by one without overrides."""
    variants = given.get("variants")
    if not isinstance(variants, dict):
        return given
    return {**given, "variants": {name: {} if v is None else v for name, v in variants.items()}}


def _explained(error: OmegaConfBaseException) -> str:
    key = error.full_key or ""
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value"
    if isinstance(error, ConfigKeyError):
        of: Any = error.object_type if isinstance(error.object_type, type) else Study
        known = list(getattr(of, "__dataclass_fields__", {}))
        nearest = difflib.get_close_matches(key.rpartition(".")[2], known, n=1)
        what = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known)}"
        return f"unknown key {key}; {what}"
    return f"{key}: {str(error).splitlines()[0]}"


def _check(study: Study) -> None:
    if not study.variants:
        raise InputError("variants is empty: name at least one")
    for name in study.variants:
        if not _SAFE_NAME.fullmatch(name) or name == START:
            raise InputError(
                f"variants.{name}: a name is made of letters, digits, _, - and ., is not "
                f'"{START}", and names the folders of its runs'
            )
        if not study.seeds_of(name):
            raise InputError(f"variants.{name} has no seeds: give seeds")
        refuse_own_keys(study.overrides_of(name), "study", _REMEDIES)
    places = {
        **{f"contrasts[{i}].left": one.left for i, one in enumerate(study.contrasts)},
        **{f"contrasts[{i}].right": one.right for i, one in enumerate(study.contrasts)},
        **{f"curves[{i}]": name for i, name in enumerate(study.curves)},
    }
    for place, name in places.items():
        check_name(study, name, place)


def check_name(study: Study, name: str, place: str) -> None:
    """Reject the name of an unknown variant.

    Raises:
        InputError: names the `place` where the name was used.
    """
    if name not in study.variants:
        raise InputError(f"{place}: no variant is called {name}; variants: {_names(study)}")


def _names(study: Study) -> str:
    return ", ".join(study.variants)
