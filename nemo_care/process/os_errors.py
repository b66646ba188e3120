"""Errors of the operating system on one line: disks that are full, places that can't be written."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A place that can't be used, which the user names or can change.
_UNUSABLE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
}
# What the machine lacks, whichever file needed it.
_REMEDIES = {
    errno.ENOSPC: "make room on that disk and give the same command again",
    errno.EDQUOT: "make room in your quota and give the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n) and give the same command again",
    errno.ENFILE: "the whole machine has too many open files; try again when it has fewer",
    errno.EIO: "look after the disk, and give the same command again",
    errno.ESTALE: "the file system changed under the command; give it again",
}
_OF_SAFETENSORS = re.compile(r"\(os error (\d+)\)")


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """An error of the operating system in the block names the file, if it names none.

    Opening a file does, writing to it does not. Also for safetensors, whose errors are of a type
    of their own.
    """
    try:
        yield
    except OSError as error:
        # One without a number is not of the operating system.
        if error.filename is None and error.errno is not None:
            error.filename = str(file)
        raise
    except Exception as error:
        found = _OF_SAFETENSORS.search(str(error))
        if found is None or not type(error).__module__.startswith("safetensors"):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from error


def os_error_line(error: OSError) -> str | None:
    """What happened, to which file, and the remedy; None where a traceback says more.

    That is an error without a file that is not about the machine's disks: of a connection, or of a
    mistake of the program.
    """
    reason = error.strerror or str(error)
    if error.filename is None:
        if error.errno in _REMEDIES:
            return f"{reason}: {_REMEDIES[error.errno]}"
        if "temporary directory" in reason:
            return f"{reason}: set TMPDIR to a folder that can be written to"
        return None
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    usable = "choose another place, or change what is there or its permissions"
    return f"{names}: {reason}; {_REMEDIES.get(error.errno or 0, usable)}"


def is_unusable_place(error: OSError) -> bool:
    """Whether the command was given a place that can't be used, and did not fail on its way."""
    return error.errno in _UNUSABLE
