"""Prepare a command line that names a recipe for Hydra.

This opens `key=value` for every key of the schema, adds the folders of recipes, and allows one
recipe at a time. What Hydra would read differently or can't do here is rejected with the remedy.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_care.errors import InputError
from nemo_care.recipe.explain import free_form_keys, names_in

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

# Hydra only composes, without folders and logs; NeMo's runner sets the last three too.
_OURS = {
    "hydra.job.chdir": "false",
    "hydra.output_subdir": "null",
    "hydra/job_logging": "stdout",
    "hydra.run.dir": ".",
}
# Groups that give a key an empty dictionary instead of null (see `_open`).
_OPENED = "opened_"


@dataclass(frozen=True)
class Arguments:
    """A prepared command line: `for_hydra` for Hydra, and the `folders` that contain recipes."""

    for_hydra: list[str]
    folders: list[Path]


def read_arguments(arguments: Sequence[str], recipes: Path) -> Arguments:
    """Check a command line and prepare it for Hydra.

    Args:
        arguments: the arguments of `nemo-care train`.
        recipes: the folder of the package's recipes.

    Raises:
        InputError: no recipe is named, a value can't be read, or the line describes several runs.
    """
    given, folders = _own_folders(arguments, recipes)
    _check_name(given, folders)
    flags, overrides = _apart(given)
    if {"--cfg", "-c"} & {flag.partition("=")[0] for flag in flags}:
        flags.append("--resolve")
    if flags[-1] in ("--info", "-i"):
        flags.append("all")  # otherwise it takes the first override as its value
    _check_flags(flags)
    # Hydra accepts overrides only in one block.
    ours = [f"{key}={value}" for key, value in _OURS.items()]
    return Arguments([*flags, *_open([_read(text) for text in overrides]), *ours], folders)


def is_opening(group: str) -> bool:
    """Whether a group of the composition opens a dictionary, and is not the user's choice."""
    return group.startswith(_OPENED)


def openings() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield groups for Hydra's store: name, and what it adds to a recipe."""
    for key in free_form_keys():
        content: Mapping[str, Any] = {}
        for part in reversed(key.split(".")):
            content = {part: content}
        yield _group_of(key), content


def _group_of(key: str) -> str:
    return _OPENED + key.replace(".", "_")


def _own_folders(arguments: Sequence[str], recipes: Path) -> tuple[list[str], list[Path]]:
    """Let `--config-path DIR` add a folder to the search path instead of replacing the package's.

    Returns the arguments for Hydra, and all folders that contain recipes.
    """
    result: list[str] = []
    folders = [recipes]
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name not in ("--config-path", "-cp"):
            result.append(argument)
            continue
        given = value if equals else next(rest, "")
        if not given or not Path(given).is_dir():
            raise InputError(f"--config-path {given}: no such folder")
        folders.append(Path(given).resolve())
        result.append(f"--config-dir={folders[-1]}")
    return result, folders


def _check_name(arguments: Sequence[str], folders: Sequence[Path]) -> None:
    """Reject a command line without a recipe's name."""
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in ("--config-name", "-cn"):
            given = value if equals else "".join(arguments[place + 1 : place + 2])
            if given and not given.startswith("-") and "=" not in given:
                return
    names = ", ".join(names_in(folders))
    raise InputError(f"--config-name is missing or has no value; recipes: {names}")


def _apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate flags, with their values, from overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    for argument in arguments:
        is_override = "=" in argument or argument.startswith("~")
        (overrides if is_override and not argument.startswith("-") else flags).append(argument)
    return flags, overrides


def _check_flags(flags: Sequence[str]) -> None:
    """Reject flags of Hydra without a meaning here, also abbreviated and combined ones."""
    from hydra._internal.utils import get_args_parser

    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            read = get_args_parser().parse_args(list(flags))
    except SystemExit:
        return  # Hydra prints something, or reports the error
    if read.multirun:
        raise _several_runs("--multirun")
    if read.overrides:
        raise InputError(
            f"{read.overrides[0]}: not an option and not key=value (a value with spaces needs "
            "quotes around the whole override)"
        )
    for name in ("experimental_rerun", "shell_completion"):
        if getattr(read, name):
            raise InputError(f"--{name.replace('_', '-')} is not supported: omit it")
    if read.resolve and not read.cfg:
        raise InputError("--resolve needs --cfg job: omit it, or add that")


def _several_runs(what: str) -> InputError:
    return InputError(
        f"{what}: one command trains one recipe, so Hydra's multirun is not supported: start a "
        "command for each recipe, or use nemo-care study or nemo-care compare"
    )


def _read(text: str) -> "Override":
    """Parse an override with Hydra.

    Raises:
        InputError: Hydra can't read it, or reads several values; the message shows how to quote it.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, _, value = text.partition("=")
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        raise InputError(
            f"{_one_line(text)}: Hydra can't read it; {_remedy(key, value)}"
        ) from error
    name = override.key_or_group
    if name in _OURS:
        raise InputError(
            f"{name} can't be set: the run directory is exp_manager.explicit_log_dir, "
            "or exp_manager.exp_dir and exp_manager.name"
        )
    if name.startswith(("hydra.sweep", "hydra/sweep", "hydra/launcher", "hydra.launcher")) or (
        name == "hydra.mode" and str(override.value()).upper().endswith("MULTIRUN")
    ):
        raise _several_runs(text)
    if override.is_sweep_override():
        # A comma outside of quotes and brackets, or range(), glob() and the like.
        raise InputError(f"{_one_line(text)} means several runs to Hydra; {_remedy(key, value)}")
    return override


def _remedy(key: str, value: str) -> str:
    """Show how to write an override whose value is a text, or a list, with any characters."""
    if "\n" in value:
        return "give a text of several lines in a recipe file"
    if key.lstrip("+") in free_form_keys():
        return "texts in a dictionary need quotes: " + _for_shell(key + "={NAME: 'TEXT'}")
    quoted = _for_shell(f"{key}={_quoted(value)}")
    listed = f"; a list needs brackets: {_for_shell(f'{key}=[{value}]')}" if "," in value else ""
    return f"a text with such characters needs quotes: {quoted}{listed}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _quoted(value: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    # The shell needs its own quotes, preferably double ones.
    quote = Quote.double if "'" in value and '"' not in value else Quote.single
    return QuotedString(value, quote).with_quotes()


def _for_shell(text: str) -> str:
    """Quote the text as one readable word of a shell."""
    return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)


def _open(overrides: "Sequence[Override]") -> list[str]:
    """Return the overrides as texts that can add keys of the user's choice to a dictionary.

    Hydra adds keys to a dictionary only with `++`, and fails on one that is null. An empty group,
    merged before the overrides, makes that an empty dictionary.

    Raises:
        InputError: a dictionary is set to null and also given a value.
    """
    texts = [str(override.input_line) for override in overrides]
    groups: dict[str, str] = {}
    for key in free_form_keys():
        places = [
            place
            for place, override in enumerate(overrides)
            if override.key_or_group.startswith(key + ".")
            or (override.key_or_group == key and isinstance(override.value(), dict))
        ]
        nulls = [
            text
            for text, override in zip(texts, overrides, strict=True)
            if override.key_or_group == key and override.value() is None
        ]
        if places and nulls:
            raise InputError(f"{nulls[0]} and {texts[places[0]]}: give one of them")
        for place in places:
            if not overrides[place].is_delete():
                texts[place] = "++" + texts[place].lstrip("+")
                groups[_group_of(key)] = key
    return [*(f"+{group}=yes" for group in groups), *texts]
