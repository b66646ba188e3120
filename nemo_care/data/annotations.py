"""Read annotations files of any layout: usable records become samples, bad ones are listed.

A data set of 260,000 lines always has a few bad ones. A loader converts one record to a sample, or
raises InputError if it can't; `Record` and `read_annotations` do the rest, so that bad lines, paths
and solutions are treated alike in every layout.
"""

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from nemo_care.data.samples import Sample, Skipped
from nemo_care.data.solutions import Accuracy, normalised_solution, why_no_answer_scores
from nemo_care.errors import InputError
from nemo_care.objective.rewards import accuracy_reward
from nemo_care.objective.text import extract_answer

# GIF is in neither, because some data sets have GIF videos.
_SUFFIXES = {
    "video": {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv"},
    "image": {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"},
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = 80
_WHITE_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Normalised:
    """A solution that was converted to the form that rewards compare; `where` is FILE:LINE."""

    where: str
    given: str
    solution: str


@dataclass(frozen=True)
class Fingerprint:
    """The identity of an annotations file's content: its SHA-256 and its number of lines."""

    file: str
    sha256: str
    lines: int


class _NumberOf(Sequence[Sample]):
    """Has the length of a file's samples, but no samples."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: Any) -> Any:
        raise LookupError("only the leaders of the model replicas have the samples")


@dataclass(frozen=True)
class Annotations:
    """The usable samples of an annotations file in file order, and its bad lines with reasons.

    `normalised` are those whose solution differs from the one in the file. Samples that were not
    read from a file have no `fingerprint`.
    """

    samples: Sequence[Sample]
    bad: list[Skipped]
    normalised: list[Normalised] = field(default_factory=list)
    fingerprint: Fingerprint | None = None

    @property
    def total(self) -> int:
        """The number of samples in the file, including bad ones."""
        return len(self.samples) + len(self.bad)

    def without_samples(self) -> "Annotations":
        """Return a copy with only the number of samples, for ranks that decode none."""
        return replace(self, samples=_NumberOf(len(self.samples)), normalised=[])


class Record:
    """One JSON object of an annotations file, with checked access to its fields.

    Every method raises InputError with a message that names file, line and field.
    """

    def __init__(
        self, content: Any, root: Path, where: str, accuracy: Accuracy = accuracy_reward
    ) -> None:
        """`where` is FILE:LINE; `accuracy` is the function that scores the sample's completions.

        Raises InputError for content that is not a JSON object.
        """
        self.root = root
        self.where = where
        self.accuracy = accuracy
        self.normalised: list[Normalised] = []
        if not isinstance(content, dict):
            raise self.error(f"must be a JSON object, not {shown(content)}")
        self.content: dict[str, Any] = content

    def error(self, reason: str) -> InputError:
        """Return the error to raise for an unusable record."""
        return InputError(f"{self.where}: {reason}")

    def has(self, key: str) -> bool:
        """Whether the field exists and is not null."""
        return self.content.get(key) is not None

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text field; without a default it is required and not empty. null is missing."""
        value = self.content[key] if self.has(key) else default
        if value is None or (default is None and value == ""):
            raise self.error(f'"{key}" is missing')
        return self._checked_text(key, value)

    def identifier(self, key: str) -> str:
        """Return a required field that names the sample: text or a whole number."""
        value = self.content.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text(key)

    def choice(self, key: str, known: Collection[str], default: str | None = None) -> str:
        """Return a text field with one of the known values."""
        value = self.text(key, default)
        if value not in known:
            raise self.error(f'unknown "{key}" {shown(value)}; known: {", ".join(known)}')
        return value

    def texts(self, key: str, default: list[str] | None = None) -> list[str]:
        """Return a list of texts; required without a default."""
        values = self.content[key] if self.has(key) else default
        if values is None:
            raise self.error(f'"{key}" is missing')
        if not isinstance(values, list):
            raise self.error(f'"{key}" must be a list')
        return [self._checked_text(key, value) for value in values]

    def mapping(self, key: str) -> dict[str, str]:
        """Return an object of texts, empty if the field is missing."""
        value = self.content[key] if self.has(key) else {}
        if not isinstance(value, dict):
            raise self.error(f'"{key}" must be a JSON object')
        return {name: self._checked_text(key, text) for name, text in value.items()}

    def solution(
        self, key: str, problem_type: str, options: Mapping[str, str], *, tagged: bool = False
    ) -> str:
        """Return the solution in a required text field, in the form that the reward compares.

        `tagged`: the layout wraps it in answer tags. Raises InputError if no answer could match the
        solution.
        """
        text = self.text(key)
        given = extract_answer(text) if tagged else text
        if given is None:
            raise self.error(f'"{key}" must hold the answer as <answer>...</answer>')
        solution = normalised_solution(problem_type, given, options)
        reason = why_no_answer_scores(problem_type, solution, options, self.accuracy)
        if reason is not None:
            raise self.error(f'"{key}" {shown(given or text)} {reason}')
        if solution != given.strip():
            self.normalised.append(Normalised(self.where.rpartition("/")[2], given, solution))
        return solution

    def media(self, name: str, kind: Literal["video", "image"]) -> Path:
        """Return the path of a video or image, given relative to the data root; it must stay in it.

        Only the text of the path is checked: `videos` can be a symbolic link to another disk, and
        the returned path contains no `..` that could leave through such a link.
        """
        if "\0" in name:
            raise self.error(f"the path {shown(name)} is not a path")
        root = str(self.root)
        text = os.path.normpath(os.path.join(root, name))
        # Compared as text: pathlib's comparison takes longer than all other parsing of a line.
        if text != root and not text.startswith(os.path.join(root, "")):
            raise self.error(f"the path {shown(name)} leaves the data root {self.root}")
        path = Path(text)
        other = "image" if kind == "video" else "video"
        if path.suffix.lower() in _SUFFIXES[other]:
            raise self.error(f"the path {shown(name)} is of type {other}, not {kind}")
        return path

    def _checked_text(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.error(f'"{key}" must be text, not {shown(value)}')
        try:
            value.encode()
        except UnicodeEncodeError:
            # JSON allows half of a surrogate pair; tokenizers and files do not.
            raise self.error(f'"{key}" contains half of a surrogate pair') from None
        return value


Parse = Callable[[Record, int], Sample]
"""Converts a record to a sample, given the run's seed; raises InputError for an unusable record."""


def read_annotations(
    root: str | Path,
    annotations: str,
    parse: Callable[[Record], Sample],
    *,
    accuracy: Accuracy = accuracy_reward,
) -> Annotations:
    """Read the samples and the bad lines of `root/annotations`.

    The file contains one JSON object per line or, if its name ends in `.json`, possibly one JSON
    array of objects. `parse` converts a record to a sample, or raises InputError. `accuracy` is the
    function that scores completions; solutions are checked with it.

    Raises:
        InputError: the file is missing, unreadable, empty or without any usable sample, or it is a
            malformed JSON array, of which nothing after the error can be read.
    """
    folder = Path(root).resolve()
    file = folder / annotations
    if not file.is_file():
        raise InputError(f"{file}: no such annotations file; check data.*.root and annotations")
    samples: list[Sample] = []
    bad: list[Skipped] = []
    normalised: list[Normalised] = []
    content_of = _Content()
    try:
        for number, entry in _entries(file, content_of):
            where = f"{file}:{number}"
            try:
                content = _decoded(entry, where) if isinstance(entry, bytes) else entry
                record = Record(content, folder, where, accuracy)
                samples.append(parse(record))
                normalised += record.normalised
            except InputError as error:
                bad.append(Skipped(None, f"{file.name}:{number}", str(error)))
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror})") from error
    if not samples and not bad:
        raise InputError(f"{file}: holds no samples")
    if not samples:
        raise InputError(
            f"{len(bad)} of {len(bad)} samples of {file} can't be used; is its kind the right one? "
            f"The first: {bad[0].reason}"
        )
    seen = content_of.fingerprint(str(Path(root) / annotations))
    return Annotations(samples, bad, normalised, seen)


class _Content:
    """Collects the fingerprint of a file while its lines are read."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._lines = 0

    def of(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the lines, and add each of them to the fingerprint."""
        for line in lines:
            self._digest.update(line)
            self._lines += 1
            yield line

    def fingerprint(self, file: str) -> Fingerprint:
        """Return the fingerprint of the lines so far."""
        return Fingerprint(file, self._digest.hexdigest(), self._lines)


def _entries(file: Path, content: _Content) -> Iterator[tuple[int, Any]]:
    """Yield line numbers from 1, each with the line's bytes or an array's element.

    At the end, `content` has read every line of the file.
    """
    with file.open("rb") as opened:
        first = next((line for line in opened if line.strip()), b"")
        opened.seek(0)
        lines = content.of(opened)
        if file.suffix != ".json" or not first.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
            return
        yield from _array_elements(file, b"".join(lines))


def _decoded(line: bytes, where: str) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        cause = error.msg
    except UnicodeDecodeError:
        cause = "not UTF-8"
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 5000 brackets
        cause = str(error)
    raise InputError(f"{where}: not valid JSON ({cause}); fix or remove the line")


def _array_elements(file: Path, content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the elements of a JSON array, each with the line on which it begins."""

    def malformed(position: int, cause: str) -> InputError:
        number = text.count("\n", 0, position) + 1
        return InputError(
            f"{file}:{number}: not valid JSON ({cause}); fix the file, or write one object per line"
        )

    def after_white_space(position: int) -> int:
        return _WHITE_SPACE.match(text, position).end()  # type: ignore[union-attr]

    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 ({error.reason}); convert the file") from error
    del content  # hundreds of MB, which the text contains again
    decoder = json.JSONDecoder()
    number, counted = 1, 0
    position = after_white_space(text.index("[") + 1)
    while not text.startswith("]", position):
        number += text.count("\n", counted, position)
        counted = position
        try:
            element, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise malformed(error.pos, error.msg) from error
        except (ValueError, RecursionError) as error:
            raise malformed(position, str(error)) from error
        yield number, element
        position = after_white_space(end)
        if text.startswith(",", position):
            position = after_white_space(position + 1)
        elif not text.startswith("]", position):
            raise malformed(position, "expecting ',' or ']'")


def shown(value: Any) -> str:
    """Return a value of the user's file on one line, shortened."""
    return _SHORT.repr(value)
