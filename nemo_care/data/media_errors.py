"""Errors of unusable video and image files, as one line that names the file."""

from pathlib import Path

from nemo_care.errors import InputError

_LONGEST_REASON = 200


class UnreadableMedia(InputError):
    """A video or image that can't be decoded; the message names the file and the cause."""


class MissingMedia(UnreadableMedia):
    """The file does not exist."""


class SlowMedia(UnreadableMedia):
    """Decoding took longer than data.seconds_per_sample and was cancelled."""


class FatalMedia(UnreadableMedia):
    """The process that decoded the file died."""


def check_file(path: Path, kind: str) -> None:
    """Refuse a path that is not a file with content; `kind` is "video" or "image".

    Raises:
        MissingMedia: the file does not exist.
        UnreadableMedia: it is empty or inaccessible.
    """
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:  # a name that is too long, a folder without permission
        raise unreadable(path, kind, str(error.strerror)) from error
    if size is None:
        raise unreadable(path, kind, "there is no such file", MissingMedia)
    if size == 0:
        raise unreadable(path, kind, "the file is empty")


def unreadable(
    path: Path, kind: str, cause: str, error: type[UnreadableMedia] = UnreadableMedia
) -> UnreadableMedia:
    """Return the error with the reason why a file can't be read."""
    name = one_line(str(path))
    return error(f"{name}: {kind} not readable: {cause}; replace the file or remove its sample")


def library_reason(error: BaseException) -> str:
    """Return a library's error message, short enough to be part of one line.

    Library messages may quote bytes of the file, so terminal control characters are removed.
    """
    # The text of an error of the operating system or ffmpeg, without its number.
    text = getattr(error, "strerror", None) or str(error)
    text = one_line(text) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


def one_line(text: str) -> str:
    """Return the text with every control character and run of white space as one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
