"""JSON files that survive a kill while being written, and are checked when read.

JSON lines are appended to, so a kill can tear the last one. A last line without a line break that
is not a complete JSON value is torn: readers omit it, and the next append removes it. Any other
damage is an InputError that names file and line.
"""

import errno
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import IO, Any, get_args, get_origin

from nemo_care.errors import InputError
from nemo_care.process.os_errors import naming

Record = dict[str, Any]
# Errors of file systems that can't sync a folder: SMB and some of FUSE.
_NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
Kinds = Mapping[str, Any]
"""The required types of a record's values, by key, such as `int | None` or `list[str]`.

As in JSON, a bool is not a number, and a whole number is valid for `float`.
"""

_NOTHING: Kinds = {}
_REMEDY = "correct or remove the line"
_NAMES = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "a text",
    NoneType: "null",
}

# ---------------------------------------------------------------------- reading


def complete_lines(
    file: Path,
    required: Kinds = _NOTHING,
    optional: Kinds = _NOTHING,
    more: Callable[[Record], str] = lambda record: "",
) -> list[Record]:
    """Return the records of a JSON-lines file without a torn last line; none if there is no file.

    `more` returns what else is wrong with a record, or an empty text.

    Raises:
        InputError: any other line is not a JSON object, a value is missing or of the wrong type, or
        the file can't be read.
    """
    if not file.exists():
        return []
    # As bytes, because a kill can tear a character. Not splitlines(), which also splits at
    # characters that JSON does not escape.
    lines = _bytes(file, "make it readable").split(b"\n")
    records = []
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = _parsed(line)
        except ValueError as error:
            if place == len(lines):
                break
            raise InputError(f"{file}:{place}: not valid JSON ({error}); {_REMEDY}") from error
        wrong = _wrong(value, required, optional) or more(value)
        if wrong:
            raise InputError(f"{file}:{place}: {wrong}; {_REMEDY}")
        records.append(value)
    return records


def read_object(
    file: Path, *, remedy: str, required: Kinds = _NOTHING, optional: Kinds = _NOTHING
) -> Record:
    """Return the one JSON object in a file; `remedy` ends the error message.

    Raises:
        InputError: the file can't be read, is not a JSON object, or a value is missing or of the
        wrong type.
    """
    content = _bytes(file, remedy)
    try:
        value = _parsed(content)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file}:{error.lineno}: not valid JSON ({error.msg}); {remedy}"
        ) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(file, content, error, remedy) from error
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}); {remedy}") from error
    wrong = _wrong(value, required, optional)
    if wrong:
        raise InputError(f"{file}: {wrong}; {remedy}")
    return value


def read_text(file: Path, *, remedy: str) -> str:
    """Return the text of a file.

    Raises:
        InputError: the file can't be read, or is not UTF-8.
    """
    content = _bytes(file, remedy)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(file, content, error, remedy) from error


def check_record(
    where: str, value: Any, required: Kinds, optional: Kinds = _NOTHING, *, remedy: str
) -> None:
    """Reject a part of a file that is not an object with such values; `where` names it.

    Raises:
        InputError: the fault and `remedy`.
    """
    wrong = _wrong(value, required, optional)
    if wrong:
        raise InputError(f"{where}: {wrong}; {remedy}")


def _bytes(file: Path, remedy: str) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror}); {remedy}") from error


def _not_utf8(file: Path, content: bytes, error: UnicodeDecodeError, remedy: str) -> InputError:
    line = content.count(b"\n", 0, error.start) + 1
    return InputError(f"{file}:{line}: not UTF-8; {remedy}")


def _parsed(content: bytes) -> Any:
    """Parse a JSON value.

    Raises:
        ValueError: it is not JSON.
    """
    # Decoded here, because json would also accept UTF-16, and surrogates as UTF-8.
    text = content.decode("utf-8")
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _wrong(value: Any, required: Kinds, optional: Kinds) -> str:
    """Return what is wrong with a record; empty if it is valid."""
    if not isinstance(value, dict):
        return "not a JSON object"
    for key, kind in {**required, **optional}.items():
        if key not in value:
            if key in required:
                return f'"{key}" is missing'
        elif not _fits(value[key], kind):
            return f'"{key}" is not {_name(kind)}'
    return ""


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    origin, within = get_origin(kind) or kind, get_args(kind)
    if origin is bool or isinstance(value, bool):
        return origin is bool and isinstance(value, bool)
    if origin is float:
        return isinstance(value, int | float)
    if not isinstance(value, origin):
        return False
    if not within:
        return True
    parts = value.values() if isinstance(value, dict) else value
    return all(_fits(part, within[-1]) for part in parts)


def _name(kind: Any) -> str:
    """Describe a type, such as "a whole number or null"."""
    if isinstance(kind, UnionType):
        return " or ".join(map(_name, get_args(kind)))
    within = get_args(kind)
    name = _NAMES[get_origin(kind) or kind]
    return f"{name} in which each value is {_name(within[-1])}" if within else name


# ---------------------------------------------------------------------- writing


def append_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a file at once; creates the file if missing."""
    with naming(file), file.open("a+b") as opened:
        _end_last_line(opened)
        opened.write(_encoded(_lines(records)))


def _end_last_line(opened: IO[bytes]) -> None:
    """Remove a torn last line, which would make the next record unreadable."""
    size = opened.seek(0, os.SEEK_END)
    if size == 0:
        return
    opened.seek(size - 1)
    if opened.read() == b"\n":
        return
    opened.seek(0)
    content = opened.read()
    begin = content.rfind(b"\n") + 1
    try:
        _parsed(content[begin:])
    except ValueError:
        opened.truncate(begin)
    else:
        opened.write(b"\n")


def replace_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a JSON-lines file (see `replace_file`)."""
    replace_file(file, _lines(records))


def replace_file(file: Path, text: str) -> None:
    """Write a file so that a reader or a kill sees either the old or the new content."""
    partial = file.with_name(file.name + ".partial")
    with naming(file):
        partial.write_bytes(_encoded(text))
        os.replace(partial, file)


def _encoded(text: str) -> bytes:
    # Half of a surrogate pair, which JSON files can hold, has no UTF-8; `\ud800` is its JSON
    # escape.
    return text.encode("utf-8", errors="backslashreplace")


def sync_file(file: Path) -> None:
    """Make sure that a file's content is on the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Make sure that a folder's names are on the disk, if the file system supports it."""
    try:
        sync_file(folder)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
