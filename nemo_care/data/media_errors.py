"""Why a video or image file can't be used, in one line that names it."""

from pathlib import Path

from nemo_care.errors import InputError

_LONGEST_REASON = 200


class UnreadableMedia(InputError):
    """A video or image that can't be decoded; the message names the file and the cause."""


class MissingMedia(UnreadableMedia):
    """There is no such file."""


class SlowMedia(UnreadableMedia):
    """It was given up after data.seconds_per_sample."""


class FatalMedia(UnreadableMedia):
    """The process that decoded it died."""


def check_file(path: Path, kind: str) -> None:
    """Refuse a path that is no file with something in it; `kind` is "video" or "image".

    Raises:
        MissingMedia: there is no such file.
        UnreadableMedia: it is empty or can't be reached.
    """
    try:
        size = path.stat().st_size if path.is_file() else None
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise unreadable(path, kind, str(error.strerror)) from error
    if size is None:
        raise unreadable(path, kind, "there is no such file", MissingMedia)
    if size == 0:
        raise unreadable(path, kind, "the file is empty")


def unreadable(
    path: Path, kind: str, cause: str, error: type[UnreadableMedia] = UnreadableMedia
) -> UnreadableMedia:
    """The error that says why a file can't be read."""
    name = one_line(str(path))
    return error(f"{name}: {kind} not readable: {cause}; replace the file or remove its sample")


def library_reason(error: BaseException) -> str:
    """What a library says is wrong, short enough to be part of one line.

    Library messages may quote bytes of the file, so that nothing a terminal obeys is kept.
    """
    # The text of an operating system's or ffmpeg's error, without its number.
    text = getattr(error, "strerror", None) or str(error)
    text = one_line(text) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


def one_line(text: str) -> str:
    """The text with every control character and run of white space as one space."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
