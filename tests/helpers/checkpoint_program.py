"""Two ranks save a checkpoint, and the disk of the second is full at the next.

Before that, each has a folder of its own.

    python tests/helpers/checkpoint_program.py FOLDER

Each rank writes what it met to FOLDER/rank-N.json.
"""

import errno
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from nemo_care.checkpoints.store import check_writable, load_checkpoint
from nemo_care.checkpoints.writer import PendingCheckpoint, _StateWriter
from nemo_care.errors import CheckpointError, DamagedCheckpoint, InputError
from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks


def made_state(value: float) -> dict:
    """Half of a vector on each rank."""
    half = torch.full((1000,), value + dist.get_rank())
    sharded = ShardedTensor.from_rank_offsets(
        "policy.vector", half, (0, dist.get_rank(), dist.get_world_size())
    )
    return {"policy": {"vector": sharded}, "trainer": {"step": value}}


def save(folder: Path, step: int) -> None:
    pending = PendingCheckpoint(folder, step, made_state(step), recipe="")
    while not pending.is_written():
        pass
    pending.finish(keep_last=2, keep_every=0)


def loaded(path: Path) -> list[float]:
    """The values of both halves."""
    half = load_checkpoint(path, lambda: made_state(0.0))["policy"]["vector"]
    halves = [torch.zeros(1000) for _ in range(dist.get_world_size())]
    dist.all_gather(halves, half)
    return sorted(set(torch.cat(halves).tolist()))


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = Ranks(Layout(), RankEnvironment.read())
    checkpoints = folder / "checkpoints"
    met: dict = {}
    check_writable(checkpoints)
    try:
        check_writable(folder / f"of_rank_{ranks.rank}")
    except InputError as error:
        met["apart"] = str(error).partition(": ")[2]
    save(checkpoints, 1)

    write = _StateWriter.write

    def full(writer):
        write(writer)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(writer.folder))

    if ranks.rank == 1:
        _StateWriter.write = full
    try:
        save(checkpoints, 2)
    except CheckpointError as error:
        met["full"] = str(error)
    _StateWriter.write = write
    met["left"] = sorted(path.name for path in checkpoints.iterdir())
    ranks.barrier()
    met["first"] = loaded(checkpoints / "step_000001")
    # Now there is room again.
    save(checkpoints, 2)
    met["second"] = loaded(checkpoints / "step_000002")
    if ranks.rank == 0:
        file = checkpoints / "step_000002" / "__1_0.distcp"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    ranks.barrier()
    try:
        loaded(checkpoints / "step_000002")
    except DamagedCheckpoint as error:
        met["damaged"] = str(error)
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(met))
    ranks.close()


if __name__ == "__main__":
    main()
