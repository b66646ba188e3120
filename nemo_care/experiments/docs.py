"""Insert a study's tables into a hand-written page.

The text between `<!-- study:NAME -->` and `<!-- /study:NAME -->`, each on its own line, is replaced
by the results; the rest of the page does not change.
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
    """Return the page's text, after checking that its blocks are in order.

    Raises:
        InputError: the file does not exist, or a block is unknown or not closed.
    """
    if not file.is_file():
        raise InputError(f"{file}: no such file; write it with <!-- study:table --> in it")
    text = read_text(file, remedy="save it as UTF-8")
    fill(text, str(file), lambda name: "")
    return text


def fill(text: str, file: str, block: Callable[[str], str]) -> str:
    """Return the page with each block's content replaced by `block` of its name.

    Raises:
        InputError: a block is unknown, not closed or not opened; names file and line.
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
            # Blank lines: in Markdown, a table right after a comment is part of the comment.
            filled += ["", block(name), ""]
        opened = None if closes else (name, place)
        filled.append(line)
    if opened is not None:
        raise InputError(_unclosed(file, *opened))
    return "\n".join(filled) + "\n"


def filled_page(text: str, file: Path, findings: Findings) -> str:
    """Return the page with the tables of these findings."""
    return fill(text, str(file), lambda name: markdown_block(findings, name, file.stem))


def update_docs(file: Path, findings: Findings) -> None:
    """Write new tables into the page, and the figures and results beside it.

    Raises:
        InputError: the page can't be used.
    """
    text = filled_page(read_page(file), file, findings)
    draw(findings, file.parent, file.stem)
    replace_lines(file.with_suffix(".jsonl"), [vars(result) for result in findings.results])
    replace_file(file, text)


def _unclosed(file: str, name: str, place: int) -> str:
    return f'{file}:{place}: the block is not closed: write "<!-- /study:{name} -->" below it'
