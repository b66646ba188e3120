"""Measure time and peak memory of a pass."""

import ctypes
import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from made import ANSWER_FROM_END

T = TypeVar("T")


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """Return the time of the fastest of `repeats` runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def peak_memory(run: Callable[[], T]) -> tuple[int, T]:
    """Return the bytes that `run` needs at its peak beyond those before it, and its result.

    Of the GPU, or of the process: Linux records the largest resident set since a 5 was written to
    /proc/self/clear_refs.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return torch.cuda.max_memory_allocated() - before, result
    # Return freed memory to the system, or a second pass would reuse that of the first.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    result = run()
    return _resident("VmHWM") - before, result


def allocated_peak(run: Callable[[], Any]) -> int:
    """Return the bytes of torch's CPU allocator at the peak of `run`, beyond those before it.

    Unlike resident memory, this excludes memory that malloc has not returned.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{field} is not in /proc/self/status")


def answer_rows(group: int) -> int:
    """Return the positions at which the fused pass needs a token of an answer."""
    return group * (ANSWER_FROM_END[0] - ANSWER_FROM_END[1])
