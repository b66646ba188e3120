"""Files that a kill can interrupt: JSON lines, and files that are there whole or not at all."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_care.os_errors import naming

Record = dict[str, Any]


def complete_lines(file: Path) -> list[Record]:
    """Records of a JSON-lines file; a line torn by a kill can only be the last and is dropped."""
    if not file.exists():
        return []
    # As bytes: a kill can tear a character. Not splitlines(): it also splits at characters that
    # JSON leaves as they are.
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def append_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write records behind those that are there, at once; the file is made when missing."""
    with naming(file), file.open("a", encoding="utf-8") as opened:
        opened.write(_lines(records))


def replace_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON-lines file in place of the old one (see `replace_file`)."""
    replace_file(file, _lines(records))


def replace_file(file: Path, text: str) -> None:
    """Write a file so that a reader or a kill sees the old or the new one, never half of it."""
    partial = file.with_name(file.name + ".partial")
    with naming(file):
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
