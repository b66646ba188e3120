"""The limit of open files of a rank; sockets to other ranks count too."""

import resource

from nemo_care.errors import InputError

# Measured: a single rank has up to 110 open files, including its decoding processes and
# TensorBoard, and each further rank adds about 5 sockets.
_OF_A_RANK = 256
_FOR_EACH_OTHER = 5


def allow_open_files(world_size: int) -> None:
    """Raise this process's limit of open files, which its children inherit, to a rank's needs.

    Raises:
        InputError: the hard limit is lower, so that libraries would fail later.
    """
    needed = _OF_A_RANK + _FOR_EACH_OTHER * (world_size - 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise InputError(
            f"this process can have {hard} open files (ulimit -n), and a rank of {world_size} "
            f"needs up to {needed}: raise the limit with ulimit -n {needed}, or as root in "
            "/etc/security/limits.conf"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
