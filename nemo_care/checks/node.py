"""Is this machine fit for a run? What a batch job asks each of its nodes before training starts.

    python -m nemo_care.checks.node --config-name RECIPE [key=value ...]

checks the GPUs (count, ECC errors, memory in use, an all-reduce among them), host memory, decoding,
and that the recipe's checkpoint and data can be read here. Exit status 0: fit; 1: not, with a line
for each reason; 2: the recipe can't be used on any machine.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from nemo_care.errors import InputError
from nemo_care.files.json_lines import replace_file
from nemo_care.process.quiet import quiet_libraries
from nemo_care.process.screen import one_line, say
from nemo_care.recipe.compose import compose_recipe
from nemo_care.recipe.schema import Recipe

_GIB = 2**30
# Of a GPU's or the host's memory: what drivers and the operating system take is less.
_LARGEST_SHARE_IN_USE = 0.1
_SMALLEST_SHARE_AVAILABLE = 0.2
_QUERY_SECONDS = 60
_ALL_REDUCE_SECONDS = 300
_ALL_REDUCE_ELEMENTS = 2**24
# Counts that a healthy GPU has none of, as nvidia-smi names them; one that a GPU lacks is "[N/A]".
_NO_ERRORS = {
    "ecc.errors.uncorrected.volatile.total": "uncorrected ECC errors since the last reset",
    "remapped_rows.failure": "failed memory row remappings",
    "remapped_rows.pending": "memory row remappings that wait for a reset",
    "retired_pages.pending": "memory pages that wait for their retirement",
}


def problems_of(recipe: Recipe) -> list[str]:
    """Why this machine can't take part in a run; empty where it can."""
    checks: list[Callable[[Recipe], list[str]]] = [
        _host_memory,
        _inputs,
        lambda _: decoding_problems(),
    ]
    if os.environ.get("NEMO_CARE_CPU") == "1":
        say("NEMO_CARE_CPU=1: the GPUs are not checked")
    else:
        checks = [_gpus, *checks]
    return [problem for check in checks for problem in check(recipe)]


# ------------------------------------------------------------------ GPUs


def _gpus(recipe: Recipe) -> list[str]:
    wanted, found = recipe.trainer.devices, torch.cuda.device_count()
    if found < wanted:
        return [
            f"{found} usable GPUs, but trainer.devices={wanted} (NEMO_CARE_CPU=1 is for runs "
            "without GPUs)"
        ]
    problems = _gpu_memory(wanted) + gpu_error_problems()
    # An all-reduce on a GPU that is known to be bad may hang for its whole time.
    return problems or _all_reduce(wanted, "nccl")


def _gpu_memory(count: int) -> list[str]:
    problems = []
    for place in range(count):
        try:
            free, total = torch.cuda.mem_get_info(place)
        except RuntimeError as error:
            problems.append(f"GPU {place} does not answer: {str(error).splitlines()[0]}")
            continue
        if total - free > _LARGEST_SHARE_IN_USE * total:
            problems.append(
                f"GPU {place}: {(total - free) / _GIB:.1f} of {total / _GIB:.1f} GiB are in use by "
                "another process"
            )
    return problems


def gpu_error_problems() -> list[str]:
    """Errors that nvidia-smi counts on this machine's GPUs; empty where there are none."""
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
        return [f"nvidia-smi does not answer: {error}"]
    if done.returncode:
        return [f"nvidia-smi fails: {' '.join((done.stdout + done.stderr).split())}"]
    return gpu_errors(done.stdout)


def gpu_errors(table: str) -> list[str]:
    """What is wrong by the lines that nvidia-smi prints for the query above."""
    problems = []
    for line in table.strip().splitlines():
        index, *counts = (cell.strip() for cell in line.split(","))
        for name, count in zip(_NO_ERRORS.values(), counts, strict=True):
            if count not in ("0", "No", "[N/A]", "N/A", "[Not Supported]"):
                problems.append(f"GPU {index}: {name}: {count}")
    return problems


def _all_reduce(count: int, backend: str) -> list[str]:
    """Sum a tensor over the GPUs of this machine, in a process for each."""
    from torch.multiprocessing.spawn import ProcessException, spawn

    with tempfile.TemporaryDirectory(prefix="nemo-care-") as folder:
        try:
            context = spawn(_reduce, (count, backend, f"{folder}/store"), nprocs=count, join=False)
            assert context is not None
            deadline = time.monotonic() + _ALL_REDUCE_SECONDS
            # It returns whenever a process has ended; True when it was the last.
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


def _host_memory(recipe: Recipe) -> list[str]:
    memory = psutil.virtual_memory()
    if memory.available >= _SMALLEST_SHARE_AVAILABLE * memory.total:
        return []
    return [
        f"only {memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB of host memory are "
        "available"
    ]


def _inputs(recipe: Recipe) -> list[str]:
    """Checkpoint and data, as this machine sees them."""
    from nemo_care.data.sources import training_sources
    from nemo_care.models.families import read_family
    from nemo_care.models.hf_tensors import check_weights

    problems = []
    try:
        read_family(recipe.model.hf_path)
        check_weights(recipe.model.hf_path)
    except InputError as error:
        problems.append(str(error))
    data = recipe.data
    has_training = data.train.sources is not None or data.train.root is not None
    roots = (
        {(source.kind, source.root) for source in training_sources(data)}
        if has_training
        else (set())
    )
    if data.validation.annotations and data.validation.root is not None:
        roots.add((data.validation.kind, data.validation.root))
    for kind, root in sorted(roots):
        # The miniature's files are written on first use.
        if kind != "miniature" and not os.access(root, os.R_OK | os.X_OK):
            problems.append(f"data root {root} can't be read")
    return problems


def decoding_problems() -> list[str]:
    """Why no video can be decoded here; empty where one was."""
    from nemo_care.data.video import FrameChoice, VideoFile
    from nemo_care.miniature.files import write_video

    try:
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


def _shared_folder(folder: Path) -> list[str]:
    """Whether the file that the batch job has written into the folder has arrived here."""
    canary = folder / "canary"
    try:
        written = canary.read_text().strip()
    except OSError as error:
        return [f"the run directory's file system is not shared with this machine: {error}"]
    job = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return [] if written == job else [f"{canary} is stale here: it says {written} instead of {job}"]


# ------------------------------------------------------------------ the command


def main(arguments: Sequence[str]) -> int:
    """Check this machine; returns the exit status."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    # A folder on the shared file system: it holds "canary" and gets a file named after this node.
    parser.add_argument("--verdict", type=Path)
    options, rest = parser.parse_known_args(arguments)
    if options.help:
        say(__doc__)
        return 0
    quiet_libraries()
    name = os.environ.get("SLURMD_NODENAME", socket.gethostname())

    def tell(verdict: str) -> None:
        say(one_line(f"{name}: {verdict}"), file=sys.stdout if verdict == "ok" else sys.stderr)
        if options.verdict is not None:
            replace_file(options.verdict / name, verdict + "\n")

    try:
        recipe = compose_recipe(rest)
    except InputError as error:
        tell(f"recipe: {error}")
        return 2
    if recipe is None:
        return 0
    try:
        problems = _shared_folder(options.verdict) if options.verdict is not None else []
        problems = problems or problems_of(recipe)
    except Exception as error:
        # Whatever breaks here would break the run.
        tell(f"{type(error).__name__}: {error}")
        raise
    tell("; ".join(problems) or "ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
