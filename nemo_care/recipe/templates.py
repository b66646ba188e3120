"""Texts with fields in braces, such as {question}, that a recipe may replace."""

import string
from collections.abc import Collection


def template_problem(template: str, known: Collection[str], needed: Collection[str]) -> str:
    """What is wrong with a template, on one line; empty where `str.format` can fill it.

    Args:
        template: The text, in which a brace that is not part of a field is written twice.
        known: The fields that it may have.
        needed: The fields that it must have.
    """
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        for name in sorted(named - set(known)):
            return f"unknown field {{{name.strip()}}}"
        for name in needed:
            if name not in named:
                return f"{{{name}}} is missing"
        # Conversions and formats are only looked at now.
        template.format(**dict.fromkeys(known, ""))
    except LookupError as error:  # of a field inside a field's format
        return f"unknown field inside a field: {error}"
    except ValueError as error:
        return str(error)
    return ""
