"""The package's own source, parsed."""

import ast
from pathlib import Path

from nemo_care.process.handover import without_collecting


def parsed(file: Path) -> ast.Module:
    """Return the syntax tree of a file.

    CPython 3.11 reports a wrong recursion depth if garbage that parses something is collected
    meanwhile (python/cpython issue 106905).
    """
    with without_collecting():
        return ast.parse(file.read_text())
