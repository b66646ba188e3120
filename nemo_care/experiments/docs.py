"""Tables of a study inside a page that a person writes.

Between `<!-- study:NAME -->` and `<!-- /study:NAME -->`, each on a line of its own, stands what the
results say; the rest of the page is left as it is.
"""

import re
from collections.abc import Callable
from pathlib import Path

from nemo_care.errors import InputError
from nemo_care.experiments.findings import Findings
from nemo_care.experiments.page import BLOCKS, draw, markdown_block
from nemo_care.files.json_lines import read_text, replace_file, replace_lines

_MARK = re.compile(r"\s*<!--\s*(/?)study:(\S*)\s*-->\s*")


def read_page(file: Path) -> str:
    """The page's text, whose blocks are in order.

    Raises:
        InputError: there is no such file, or a block that is unknown or not closed.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; write it with <!-- study:table --> in it")
    text = read_text(file, remedy="save it as UTF-8")
    fill(text, str(file), lambda name: "")
    return text


def fill(text: str, file: str, block: Callable[[str], str]) -> str:
    """The page with each block's content replaced by what `block` gives for its name.

    Raises:
        InputError: a block that is unknown, not closed or not opened, with file and line.
    """
    filled: list[str] = []
    opened: tuple[str, int] | None = None
    for place, line in enumerate(text.splitlines(), start=1):
        mark = _MARK.fullmatch(line)
        if mark is None:
            if opened is None:
                filled.append(line)
            continue
        closes, name = bool(mark[1]), mark[2]
        if name not in BLOCKS:
            known = ", ".join(BLOCKS)
            raise InputError(f'{file}:{place}: there is no block "study:{name}"; blocks: {known}')
        if closes and (opened is None or opened[0] != name):
            raise InputError(f'{file}:{place}: "/study:{name}" closes what is not open')
        if not closes and opened is not None:
            raise InputError(_unclosed(file, *opened))
        if closes:
            # Blank lines: Markdown takes a table that touches a comment for part of it.
            filled += ["", block(name), ""]
        opened = None if closes else (name, place)
        filled.append(line)
    if opened is not None:
        raise InputError(_unclosed(file, *opened))
    return "\n".join(filled) + "\n"


def filled_page(text: str, file: Path, findings: Findings) -> str:
    """The page with the tables of these findings."""
    return fill(text, str(file), lambda name: markdown_block(findings, name, file.stem))


def update_docs(file: Path, findings: Findings) -> None:
    """Put fresh tables into the page, and beside it the figures and the results.

    Raises:
        InputError: the page can't be used.
    """
    text = filled_page(read_page(file), file, findings)
    draw(findings, file.parent, file.stem)
    replace_lines(file.with_suffix(".jsonl"), [vars(result) for result in findings.results])
    replace_file(file, text)


def _unclosed(file: str, name: str, place: int) -> str:
    return f'{file}:{place}: the block is not closed: write "<!-- /study:{name} -->" below it'
