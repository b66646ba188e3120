"""Make a page with every recipe key from the schema and the docstrings in its source.

python -m nemo_care.recipe.docs > docs/recipe.md
"""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from types import ModuleType
from typing import Any, get_args, get_type_hints

from omegaconf import MISSING

from nemo_care.process.screen import say
from nemo_care.recipe.schema import CHOICES, RANGES, Recipe

_HEAD = """# Recipe keys

Made by `make docs` from the schema; the defaults are the reference values of GRPO-CARE. A key is
set in a recipe (`recipes/`) or on the command line (`key=value`); `nemo-care train --config-name
RECIPE --cfg job` prints all keys of a recipe with their values.
"""


@dataclass(frozen=True)
class Key:
    """One key of the schema."""

    name: str
    type: str
    default: str
    allowed: str
    """Choices or range; empty if the type is sufficient."""
    text: str
    """The docstring in the schema's source; can be empty."""


@dataclass(frozen=True)
class Block:
    """Keys with a common parent."""

    name: str
    text: str
    keys: list[Key]


def blocks() -> list[Block]:
    """Return all blocks of the schema in its order, parents before their children."""
    return list(_blocks(Recipe, ""))


def page() -> str:
    """Return the page as Markdown."""
    lines = [_HEAD]
    for block in blocks():
        if not block.keys:
            continue
        lines += [f"## {block.name}", "", block.text, ""]
        lines += ["| key | type | default | allowed | |", "| --- | --- | --- | --- | --- |"]
        for key in block.keys:
            cells = [f"`{key.name}`", f"`{key.type}`", key.default, key.allowed, key.text]
            # A bar would end the cell, even inside code.
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _blocks(schema: type, prefix: str) -> Iterator[Block]:
    hints, texts = get_type_hints(schema), _field_texts(schema)
    keys: list[Key] = []
    children: list[tuple[type, str]] = []
    for field in dataclasses.fields(schema):
        name, hint = prefix + field.name, hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            children.append((hint, name + "."))
            continue
        children += [(item, name + "[].") for item in _listed_schemas(hint)]
        keys.append(
            Key(name, _type_name(hint), _default(field), _allowed(name), texts.get(field.name, ""))
        )
    text = " ".join((inspect.getdoc(schema) or "").split())
    yield Block(prefix.rstrip("."), text, keys)
    for child, child_prefix in children:
        yield from _blocks(child, child_prefix)


def _listed_schemas(hint: Any) -> Iterator[type]:
    """Yield the dataclasses inside a type such as list[SourceConfig] | None."""
    for part in get_args(hint):
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            yield part
        yield from _listed_schemas(part)


def _type_name(hint: Any) -> str:
    name = hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)
    return re.sub(r"\b(typing|nemo_care(?:\.\w+)+)\.", "", name).replace("None", "null")


def _default(field: "dataclasses.Field[Any]") -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value == MISSING:
        return "required"
    if value is None:
        return "`null`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _allowed(name: str) -> str:
    """Return a key's choices or range; those of data.train.sources[] are those of data.train."""
    name = name.replace(".sources[]", "")
    if name in CHOICES:
        return ", ".join(CHOICES[name])
    low, high = RANGES.get(name, (None, None))
    if low is None:
        return "" if high is None else f"at most {high:g}"
    return f"at least {low:g}" if high is None else f"{low:g} to {high:g}"


def _field_texts(schema: type) -> dict[str, str]:
    """Return the docstrings after a dataclass's fields, which Python itself does not keep."""
    module = inspect.getmodule(schema)
    assert module is not None
    body = _class_bodies(module)[schema.__name__]
    texts = {}
    for field, text in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
        ):
            texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


@cache
def _class_bodies(module: ModuleType) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(inspect.getsource(module))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


if __name__ == "__main__":
    say(page(), end="")
