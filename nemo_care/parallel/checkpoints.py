"""Checkpoints that any layout can load: `megatron.core.dist_checkpointing`, one folder a step.

A checkpoint is written under a temporary name and renamed when it is complete, so a folder named
`step_...` is always whole.
"""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from nemo_care.errors import InputError

_NAME = re.compile(r"step_(\d+)")


def sharding_metadata() -> dict[str, Any]:
    """How Megatron lays out sharded state: resharding to any other layout must be possible."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"step_{step:06d}"


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is a checkpoint."""
    return (path / "metadata.json").is_file()


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Whole shape of each tensor of a checkpoint, by its key; reads its index only."""
    stored = dist_checkpointing.load_tensors_metadata(str(path))
    return {key: tuple(tensor.global_shape) for key, tensor in stored.items()}


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _match(path))]
    return [path for _, path in sorted(found)]


def _match(path: Path) -> re.Match[str] | None:
    return _NAME.fullmatch(path.name) if path.is_dir() else None


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep_last: int) -> None:
    """Write a sharded state; all ranks call it. Older checkpoints beyond `keep_last` go."""
    target = checkpoint_path(folder, step)
    partial = target.with_name(target.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    with _single_threaded():
        dist_checkpointing.save(state, str(partial), content_metadata=metadata)
    if dist.get_rank() == 0:
        # A run that was killed after this step, resumed from an older one, writes it again.
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        if keep_last:
            for old in list_checkpoints(folder)[:-keep_last]:
                shutil.rmtree(old)
    dist.barrier()


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Megatron writes in forked processes, and a forked OpenMP pool hangs when it is used."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_checkpoint(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill a sharded state from a checkpoint; all ranks call it.

    Raises:
        InputError: `path` holds no checkpoint.
    """
    if not is_checkpoint(path):
        raise InputError(f"{path}: not a checkpoint; give a folder named step_... of a run")
    return dist_checkpointing.load(state, str(path))
