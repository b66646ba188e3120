"""Time, peak memory and FLOPs of a pass."""

import ctypes
import gc
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from made import ANSWER_FROM_END, MERGE, PATCH, TEMPORAL_PATCH, Size, video_grid

T = TypeVar("T")


def seconds(run: Callable[[], Any], repeats: int) -> float:
    """The shortest of `repeats` runs."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)


def peak_memory(run: Callable[[], T]) -> tuple[int, T]:
    """Bytes that `run` needs at its peak beyond what was there before, and its result.

    Of the GPU, or of the process: Linux keeps the largest resident set since a 5 was written to
    /proc/self/clear_refs.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return torch.cuda.max_memory_allocated() - before, result
    # Give freed memory back, or a second pass would live in what the first has left.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    result = run()
    return _resident("VmHWM") - before, result


def allocated_peak(run: Callable[[], Any]) -> int:
    """Bytes that torch's CPU allocator gives out at the peak of `run`, beyond what it held before.

    The resident memory also holds what malloc has not given back.
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


def trunk_flops(size: Size, prompt: int, completion: int, group: int, *, shared: bool) -> float:
    """Forward FLOPs of the language model's layers for one group, attention included."""
    width = size.hidden // size.heads
    per_token = (
        2 * size.hidden * (size.hidden + 2 * size.key_heads * width)
        + 2 * size.hidden * size.hidden
        + 6 * size.hidden * size.intermediate
    )
    if shared:
        tokens = prompt + group * completion
        pairs = _triangle(prompt) + group * (completion * prompt + _triangle(completion))
    else:
        tokens = group * (prompt + completion)
        pairs = group * _triangle(prompt + completion)
    return size.layers * (tokens * per_token + pairs * 4 * size.heads * width)


def head_flops(size: Size, rows: int) -> float:
    """FLOPs of the output layer on so many positions."""
    return 2.0 * rows * size.hidden * size.vocabulary


def answer_rows(group: int) -> int:
    """Positions at which the fused pass asks for a token of an answer."""
    return group * (ANSWER_FROM_END[0] - ANSWER_FROM_END[1])


def vision_flops(size: Size, prompt: int) -> float:
    """Forward FLOPs of the vision tower for one prompt (windowed attention, one full layer)."""
    time_, height, width = video_grid(prompt)
    patches = time_ * height * width
    h = size.vision_hidden
    embed = 2 * patches * (3 * TEMPORAL_PATCH * PATCH**2) * h
    block = patches * (2 * h * 3 * h + 2 * h * h + 6 * h * 2 * h)
    window = (112 // PATCH) ** 2
    attention = 4 * h * patches * ((size.vision_depth - 1) * window + height * width)
    merged = MERGE**2 * h
    merge = patches // MERGE**2 * (2 * merged * merged + 2 * merged * size.hidden)
    return embed + size.vision_depth * block + attention + merge


def _triangle(n: int) -> float:
    return n * (n + 1) / 2
