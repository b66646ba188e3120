"""One-line messages for operating system errors: full disks, unusable places."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A place that can't be used, which the user has named or can change.
_UNUSABLE = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
}
# Resources that the machine lacks, whichever file needed them.
_REMEDIES = {
    errno.ENOSPC: "make room on that disk and repeat the command",
    errno.EDQUOT: "make room in your quota and repeat the command",
    errno.EMFILE: "raise the limit of open files (ulimit -n) and repeat the command",
    errno.ENFILE: "the whole machine has too many open files; try again when it has fewer",
    errno.EIO: "check the disk and repeat the command",
    errno.ESTALE: "the file system changed during the command; repeat it",
}
_OF_SAFETENSORS = re.compile(r"\(os error (\d+)\)")


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Add the file name to an operating system error in the block that has none.

    Opening a file adds its name, writing to it does not. Also for safetensors, which has its own
    type of error.
    """
    try:
        yield
    except OSError as error:
        # An error without a number is not from the operating system.
        if error.filename is None and error.errno is not None:
            error.filename = str(file)
        raise
    except Exception as error:
        found = _OF_SAFETENSORS.search(str(error))
        if found is None or not type(error).__module__.startswith("safetensors"):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(file)) from error


def os_error_line(error: OSError) -> str | None:
    """Return what happened, to which file, and the remedy; None if a traceback says more.

    None is returned for an error without a file that does not concern the machine's disks, such as
    one of a connection or a bug.
    """
    reason = error.strerror or str(error)
    if error.filename is None:
        if error.errno in _REMEDIES:
            return f"{reason}: {_REMEDIES[error.errno]}"
        if "temporary directory" in reason:
            return f"{reason}: set TMPDIR to a writable folder"
        return None
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    usable = "choose another place, or change what is there or its permissions"
    return f"{names}: {reason}; {_REMEDIES.get(error.errno or 0, usable)}"


def is_unusable_place(error: OSError) -> bool:
    """Whether the command was given an unusable place, rather than failing later."""
    return error.errno in _UNUSABLE
