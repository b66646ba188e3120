"""One run in a directory at a time: a lock that ends with the process that holds it.

It is the kernel's (`flock`), so one that a killed process held is free at once; the file says who
holds it. Where a file system has no such locks, its content stands in: a process of this machine
that still runs is refused, and the console says that others are not kept apart.
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
# What file systems without locks answer: some of NFS, Lustre (mounted without flock), FUSE.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_held: set[int] = set()


def _forget_in_child() -> None:
    """A forked child would hold its parent's locks on."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)


@contextmanager
def run_lock(folder: Path, command: str, *, name: str = LOCK) -> Iterator[None]:
    """Hold a directory for this process.

    Args:
        folder: The directory, which is there.
        command: What this process does, for those that come later.
        name: The file in it.

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
        # Removed while it is held: whoever has opened it meanwhile sees that it is another file.
        # What ended the run counts, and not that its disk takes no removal either; the next holder
        # takes a file that is left.
        with suppress(OSError):
            file.unlink(missing_ok=True)
        _held.discard(descriptor)
        os.close(descriptor)


def _acquire(file: Path) -> int:
    """Open and lock the file."""
    while True:
        # Python's descriptors do not pass to programs that this one starts.
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
    """Whether the file has not been removed by its holder, and perhaps made anew, meanwhile."""
    try:
        return os.path.samestat(file.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> dict[str, Any]:
    """What the file says; empty where its holder has not written yet."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _runs_here(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    # A restarted container has the same name, and gives out the same numbers again.
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
    who = "another process"
    if holder:
        who = (
            f"nemo-care {holder.get('command')} on {holder.get('host')} (process "
            f"{holder.get('pid')}, since {holder.get('since')})"
        )
    return InputError(
        f"{file.parent} is in use by {who}: wait until it has ended, or choose another directory "
        "(exp_manager.explicit_log_dir)"
    )
