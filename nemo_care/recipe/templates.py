"""Check texts with fields in braces, such as {question}, that a recipe can replace."""

import string
from collections.abc import Collection


def template_problem(template: str, known: Collection[str], needed: Collection[str]) -> str:
    """Return what is wrong with a template, in one line; empty if `str.format` can fill it.

    Args:
        template: the text, in which a brace that is not part of a field is doubled.
        known: the allowed fields.
        needed: the required fields.
    """
    try:
        named = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
        for name in sorted(named - set(known)):
            return f"unknown field {{{name.strip()}}}"
        for name in needed:
            if name not in named:
                return f"{{{name}}} is missing"
        # `format` checks conversions and formats.
        template.format(**dict.fromkeys(known, ""))
    except LookupError as error:  # of a field inside a field's format
        return f"unknown field inside a field: {error}"
    except ValueError as error:
        return str(error)
    return ""
