"""Checkpoints that any layout can load: `megatron.core.dist_checkpointing`, one folder per step.

A checkpoint is written under a temporary name (`writer.py`) and renamed when it is complete; before
it is removed it is renamed again. A folder named `step_...` is therefore complete, and its manifest
shows whether it is unchanged.

    step_000010                    a checkpoint
    step_000010.partial-1f00b4c2   being written, or left by a killed run
    step_000010.removed-77ab03d1   being removed
    step_000010.damaged            changed since it was written; set aside by the run that found it
"""

import contextlib
import re
import secrets
import shutil
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_care.checkpoints.manifest import FileRecord, check_sizes, find_changed, read_manifest
from nemo_care.checkpoints.pickles import check_pickles, load, read_index
from nemo_care.errors import DamagedCheckpoint, InputError
from nemo_care.ranks.process_groups import Ranks

_NAME = re.compile(r"step_\d+")
_LEFT_OVER = re.compile(r"step_\d+\.(partial|removed)-[0-9a-f]+")
_DAMAGED = re.compile(r"step_\d+\.damaged(-[0-9a-f]+)?")
_REFERENCE = "reference"
_WEIGHTS = {"policy", _REFERENCE}  # parts that are whole models
# Stored in the checkpoint.
CONTENT_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharding_metadata() -> dict[str, Any]:
    """Return Megatron's metadata for sharded state that can be resharded to any layout.

    Only the first data-parallel rank gathers the optimizer's state, over gloo. Otherwise every rank
    would hold all of it in CPU memory, with two copies of each tensor on its GPU, and all but the
    first rank's would be discarded. The disadvantage is that it is sent over gloo's network.
    """
    return {
        **CONTENT_METADATA,
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of `step`."""
    return folder / f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint from its name (see `checkpoint_path`)."""
    return int(checkpoint.name.removeprefix("step_"))


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is a checkpoint."""
    return (path / "metadata.json").is_file()


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first."""
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    return sorted(found, key=step_of)


def list_damaged(folder: Path) -> list[Path]:
    """Return the checkpoints that were set aside."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _DAMAGED.fullmatch(path.name))


# ---------------------------------------------------------------------- removing


def discard(checkpoint: Path) -> None:
    """Remove a checkpoint; a kill during removal leaves nothing that looks like one."""
    going = checkpoint.with_name(f"{checkpoint.name}.removed-{secrets.token_hex(4)}")
    checkpoint.rename(going)
    _remove(going)


def _remove(path: Path) -> None:
    """Remove a folder without a checkpoint's name; what can't be removed is left to the next start.

    NFS keeps the folder of a file that another process, such as an evaluation, is reading.
    """
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_old(folder: Path, *, keep_last: int, keep_every: int) -> None:
    """Remove all but the last `keep_last` checkpoints (0: none) and each `keep_every`th step's."""
    if not keep_last:
        return
    for old in list_checkpoints(folder)[:-keep_last]:
        if not (keep_every and step_of(old) % keep_every == 0):
            discard(old)


def remove_left_overs(folder: Path) -> None:
    """Remove what killed runs left half written or half removed."""
    if folder.is_dir():
        for path in folder.iterdir():
            if _LEFT_OVER.fullmatch(path.name):
                _remove(path)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that no run uses it, and return its new path."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    if aside.exists():
        aside = aside.with_name(f"{aside.name}-{secrets.token_hex(4)}")
    return checkpoint.rename(aside)


def check_writable(folder: Path) -> None:
    """Create the folder of checkpoints and test writing to it; collective over all ranks.

    Raises:
        InputError: a rank can't write, or sees a different folder of that name; it would then
        consider the checkpoints of the other ranks damaged.
    """
    name = Ranks.from_rank_zero(lambda: f"canary-{secrets.token_hex(4)}")
    first, mine = (folder / f"{name}-{rank}" for rank in (0, dist.get_rank()))
    try:
        _refuse_first(folder, _why_not_writable(mine))
        _refuse_first(
            folder,
            None
            if first.exists()
            else "files from rank 0 do not appear there; all machines must share the folder",
        )
    finally:
        with contextlib.suppress(OSError):
            mine.unlink()


def _why_not_writable(canary: Path) -> str | None:
    try:
        canary.parent.mkdir(parents=True, exist_ok=True)
        canary.write_bytes(b"\0" * 4096)
    except OSError as error:
        return str(error)
    return None


def _refuse_first(folder: Path, reason: str | None) -> None:
    """Raise the first rank's reason against the folder, on all ranks alike."""
    first = Ranks.first_problem(reason)
    if first is not None:
        rank, its = first
        raise InputError(
            f"{folder}: no checkpoint can be written there: {its} (rank {rank}); repair the "
            "folder, or choose another exp_manager.exp_dir or exp_manager.explicit_log_dir"
        )


# ---------------------------------------------------------------------- reading


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the whole shape of each tensor of a checkpoint by key; reads only its index.

    Raises:
        InputError: the index can't be read, or contains what no checkpoint does.
    """
    return {
        key: tuple(stored.size)
        for key, stored in read_index(path).state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }


def check_files(path: Path) -> dict[str, FileRecord]:
    """Check that a checkpoint's files are complete by their sizes, and return their records.

    Raises:
        DamagedCheckpoint: names the first file that is not.
    """
    files = read_manifest(path)
    check_sizes(path, files)
    return files


def verify_checkpoint(path: Path, parts: Collection[str] | None = None) -> None:
    """Check that a checkpoint is unchanged; all ranks call it, and share the reading.

    The sizes of all files are checked first, which is cheap; then the checksums.

    Args:
        path: the checkpoint.
        parts: parts whose checksums are compared (`policy`, `optimizer`, `reference`); None: all.

    Raises:
        DamagedCheckpoint: names the first damaged file; raised on all ranks.
    """
    files = Ranks.from_rank_zero(lambda: check_files(path))
    wanted = {
        name: record
        for name, record in files.items()
        if parts is None or record.part is None or record.part in parts
    }
    mine = _dealt(wanted, dist.get_world_size())[dist.get_rank()]
    first = Ranks.first_problem(find_changed(path, mine))
    if first is not None:
        raise DamagedCheckpoint(first[1])


def _dealt(files: dict[str, FileRecord], ranks: int) -> list[dict[str, FileRecord]]:
    """Distribute files over the ranks: largest first, to the rank with the least to read."""
    shares: list[dict[str, FileRecord]] = [{} for _ in range(ranks)]
    loads = [0] * ranks
    for name, record in sorted(files.items(), key=lambda file: (-file[1].bytes, file[0])):
        lightest = loads.index(min(loads))
        shares[lightest][name] = record
        loads[lightest] += record.bytes
    return shares


def load_checkpoint(
    path: Path, make_state: Callable[[], dict[str, Any]], parts: Collection[str] | None = None
) -> dict[str, Any]:
    """Verify a checkpoint and fill a sharded state from it; collective over all ranks.

    Args:
        path: the checkpoint.
        make_state: makes the state to fill; called after the verification.
        parts: the parts of the checkpoint in the state (see `verify_checkpoint`).

    Raises:
        InputError: the checkpoint would run code when it is loaded, or lacks what the state needs.
        DamagedCheckpoint: it has changed since it was written, or is not a checkpoint.
    """
    verify_checkpoint(path, parts)
    Ranks.from_rank_zero(lambda: check_pickles(path))
    state = make_state()
    # Each rank has its part of the model: all must stop if one of them finds a difference.
    misfit = Ranks.first_problem(_misfit(path, state))
    if misfit is not None:
        raise InputError(misfit[1])
    return load(state, path)


def _misfit(path: Path, state: dict[str, Any]) -> str | None:
    """Return why a checkpoint can't fill a sharded state; collective over all ranks.

    A tensor can be missing, have a different shape, or be in the checkpoint only: for example, a
    vision tower with fewer layers finds all of its tensors in the checkpoint of a larger one.
    """
    stored = stored_shapes(path)
    tensors = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    kinds = (ShardedTensor, ShardedTensorFactory)
    keys = {str(value.key) for value in nested_values(state) if isinstance(value, kinds)}
    everyone: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, keys)
    known = set().union(*everyone)
    if _parts(keys) - _parts(stored) == {_REFERENCE}:
        return (
            f"{path}: the run began without a reference, and the recipe needs one now "
            "(algorithm.consistency.bonus_coefficient or algorithm.kl_coefficient above 0): set "
            "both to 0, or begin another run (exp_manager.name) from this one's exported model"
        )
    different: list[tuple[str, Any, Any]] = [
        (tensor.key, stored.get(tensor.key), tuple(tensor.global_shape))
        for tensor in tensors
        if stored.get(tensor.key) != tuple(tensor.global_shape) and not tensor.allow_shape_mismatch
    ]
    different += [
        (key, shape, None)
        for key, shape in stored.items()
        if key not in known and key.partition(".")[0] in _parts(known) & _WEIGHTS
    ]
    for key, shape, wanted in different:
        return (
            f"{path}: not a checkpoint of this architecture: {key} is {shape or 'missing'} there, "
            f"and {wanted or 'missing'} in the recipe's model; set model.hf_path to the model that "
            "the run began with, or begin another run (exp_manager.name)"
        )
    return None


def _parts(keys: Iterable[str]) -> set[str]:
    """Return the first components of tensor keys, such as `policy` and `reference`."""
    return {key.partition(".")[0] for key in keys}
