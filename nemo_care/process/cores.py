"""The CPU cores of this process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Where Linux describes devices and memory nodes.
_SYS = Path("/sys")
# The cores before `bind_near`.
_unbound: set[int] | None = None


def available_cores() -> int:
    """Return the number of cores available to this process."""
    return len(os.sched_getaffinity(0))


def bind_near(pci_address: str) -> None:
    """Bind this thread, and those that it starts, to the cores on the NUMA node of a device.

    Only to cores that the process may use. Nothing changes if there are none, or if the machine
    does not say where the device is, as one with a single node.

    Args:
        pci_address: of a GPU, such as 0000:dc:00.0.
    """
    global _unbound
    try:
        node = int((_SYS / "bus/pci/devices" / pci_address / "numa_node").read_text())
        cores = (_SYS / f"devices/system/node/node{node}/cpulist").read_text()
    except OSError:
        return
    allowed = os.sched_getaffinity(0)
    near = allowed & _numbers(cores)
    if near:
        _unbound = allowed
        os.sched_setaffinity(0, near)


@contextmanager
def unbound() -> Iterator[None]:
    """Let processes that are started in the block use the cores from before `bind_near`."""
    if _unbound is None:
        yield
        return
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _unbound)
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)


def _numbers(ranges: str) -> set[int]:
    """Return the numbers of a list such as 0-3,8."""
    numbers = set()
    for part in ranges.strip().split(","):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers
