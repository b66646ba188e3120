"""Problems of a machine's GPUs, memory and decoders, one line each.

A check of a recipe yields lines, and does its own imports.
"""

import subprocess
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from nemo_care.checks.machine import GIB
from nemo_care.errors import InputError
from nemo_care.process.environment import CPU
from nemo_care.recipe.schema import Recipe

# Share of GPU or host memory; drivers and the operating system use less.
_LARGEST_SHARE_IN_USE = 0.1
_SMALLEST_SHARE_AVAILABLE = 0.2
_QUERY_SECONDS = 60
_ALL_REDUCE_SECONDS = 300
_ALL_REDUCE_ELEMENTS = 2**24
# Error counters that are 0 on a healthy GPU, by nvidia-smi's names; "[N/A]" if a GPU has none.
_NO_ERRORS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors since the last reset",
    "remapped_rows.failure": "failed memory row remappings",
    "remapped_rows.pending": "memory row remappings pending a reset",
    "retired_pages.pending": "memory pages pending retirement",
}


# ------------------------------------------------------------------ GPUs


def gpu_problems(recipe: Recipe) -> list[str]:
    """Report too few GPUs, GPUs that are in use or broken, or that can't communicate."""
    import torch

    wanted, found = recipe.trainer.devices, torch.cuda.device_count()
    if found < wanted:
        return [
            f"{found} usable GPUs, but trainer.devices={wanted} ({CPU}=1 is for runs without GPUs)"
        ]
    problems = gpu_memory_problems(wanted) + gpu_error_problems()
    # An all-reduce on a GPU that is known to be bad can hang until its timeout.
    return problems or all_reduce_problems(wanted, "nccl")


def gpu_memory_problems(count: int) -> list[str]:
    """Report GPUs whose memory another process uses, or which do not respond."""
    import torch

    problems = []
    for place in range(count):
        try:
            free, total = torch.cuda.mem_get_info(place)
        except RuntimeError as error:
            problems.append(f"GPU {place} does not respond: {str(error).splitlines()[0]}")
            continue
        if total - free > _LARGEST_SHARE_IN_USE * total:
            problems.append(
                f"GPU {place}: {(total - free) / GIB:.1f} of {total / GIB:.1f} GiB are in use by "
                "another process"
            )
    return problems


def gpu_error_problems() -> list[str]:
    """Return the errors that nvidia-smi counts on this machine's GPUs."""
    command = ["nvidia-smi", f"--query-gpu=index,{','.join(_NO_ERRORS)}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=_QUERY_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"nvidia-smi does not respond: {error}"]
    if done.returncode:
        return [f"nvidia-smi fails: {' '.join((done.stdout + done.stderr).split())}"]
    return gpu_errors(done.stdout)


def gpu_errors(table: str) -> list[str]:
    """Return the errors in the lines that nvidia-smi prints for the query above."""
    problems = []
    for line in table.strip().splitlines():
        index, *counts = (cell.strip() for cell in line.split(","))
        for name, count in zip(_NO_ERRORS.values(), counts, strict=True):
            if count not in ("0", "No", "[N/A]", "N/A", "[Not Supported]"):
                problems.append(f"GPU {index}: {name}: {count}")
    return problems


def all_reduce_problems(count: int, backend: str) -> list[str]:
    """Sum a tensor over the GPUs of this machine, with one process per GPU."""
    from torch.multiprocessing.spawn import ProcessException, spawn

    with tempfile.TemporaryDirectory(prefix="nemo-care-") as folder:
        try:
            context = spawn(_reduce, (count, backend, f"{folder}/store"), nprocs=count, join=False)
            assert context is not None
            deadline = time.monotonic() + _ALL_REDUCE_SECONDS
            # `join` returns whenever a process has ended; True after the last.
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    for process in context.processes:
                        process.kill()
                    return [f"an all-reduce among {count} ranks hangs ({backend})"]
        except ProcessException as error:
            cause = str(error).strip().splitlines()[-1]
            return [f"an all-reduce among {count} ranks fails ({backend}): {cause}"]
    return []


def _reduce(rank: int, count: int, backend: str, store: str) -> None:
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=_ALL_REDUCE_SECONDS),
    )
    values = torch.arange(_ALL_REDUCE_ELEMENTS, dtype=torch.float32, device=device) % 64
    expected = values * (count * (count + 1) // 2)
    values *= rank + 1
    dist.all_reduce(values)
    if not torch.equal(values, expected):
        raise RuntimeError("the sum is wrong")
    dist.destroy_process_group()


# ------------------------------------------------------------------ the rest of the machine


def host_memory_problems() -> list[str]:
    """Report that most of this machine's memory is in use."""
    import psutil

    memory = psutil.virtual_memory()
    if memory.available >= _SMALLEST_SHARE_AVAILABLE * memory.total:
        return []
    return [
        f"only {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB of host memory are "
        "available"
    ]


def decoding_problems() -> list[str]:
    """Report why no video can be decoded here; empty if one was decoded."""
    try:
        import torch

        from nemo_care.data.video import FrameChoice, VideoFile
        from nemo_care.data.video_writer import write_video

        with tempfile.TemporaryDirectory(prefix="nemo-care-") as folder:
            file = Path(folder) / "video.mp4"
            write_video(file, torch.zeros(8, 28, 28, 3, dtype=torch.uint8))
            video = VideoFile(file, FrameChoice())
            frames = list(video.frames())
    except (ImportError, OSError, InputError) as error:
        return [f"videos can't be decoded: {error}"]
    if video.by_pyav:
        return ["decord can't decode an ordinary video; PyAV can"]
    return [] if frames else ["videos can't be decoded: no frames"]
