"""A lock that allows one run at a time in a directory, and ends with the process that holds it.

It is the kernel's (`flock`), so the lock of a killed process is free at once; the file names the
holder. On a file system without locks the content is used instead: a second process of this machine
is rejected while the first runs, and the console warns that other machines are not detected.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nemo_care.errors import InputError
from nemo_care.process.screen import say

LOCK = "run.lock"
# Errors of file systems without locks: some of NFS, Lustre (mounted without flock), FUSE.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_held: set[int] = set()


def _forget_in_child() -> None:
    """Close the locks in a forked child, which would otherwise keep its parent's locks."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def run_lock(folder: Path, command: str, *, name: str = LOCK) -> Iterator[None]:
    """Lock a directory for this process.

    Args:
        folder: the directory, which exists.
        command: what this process does, for the message to later processes.
        name: name of the lock file.

    Raises:
        InputError: another process holds it; the message says which, where and since when.
    """
    file = folder / name
    descriptor = _acquire(file)
    _held.add(descriptor)
    try:
        about = {
            "command": command,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        os.ftruncate(descriptor, 0)
        os.write(descriptor, (json.dumps(about) + "\n").encode())
        yield
    finally:
        # Removed while locked: a process that has opened it meanwhile detects the new file. The
        # error that ended the run counts, not a disk that refuses the removal; a leftover file is
        # used by the next holder.
        with suppress(OSError):
            file.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(file: Path) -> int:
    """Open and lock the file."""
    while True:
        # Python's descriptors are not inherited by programs that this one starts.
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(file, descriptor)
            if _is_same(file, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(file: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(file, _holder(descriptor)) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        holder = _holder(descriptor)
        if _runs_here(holder):
            raise _in_use(file, holder) from error
        say(
            f"warning: the file system of {file.parent} has no locks ({error.strerror}): processes "
            "of other machines that work there too are not noticed",
            file=sys.stderr,
        )


def _is_same(file: Path, descriptor: int) -> bool:
    """Whether the file is still the opened one, and was not removed or replaced meanwhile."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> dict[str, Any]:
    """Return the content of the file; empty if its holder has not written it yet."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _runs_here(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    # A restarted container has the same name and reuses process ids.
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _in_use(file: Path, holder: dict[str, Any]) -> InputError:
    user = "another process"
    if holder:
        user = (
            f"nemo-care {holder.get('command')} on {holder.get('host')} (process "
            f"{holder.get('pid')}, since {holder.get('since')})"
        )
    return InputError(
        f"{file.parent} is in use by {user}: wait until it has ended, or choose another directory "
        "(exp_manager.explicit_log_dir)"
    )
