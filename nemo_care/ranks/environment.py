"""The position of a process among the ranks of a run; quick to import."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class RankEnvironment:
    """Position of this process among the ranks, as set by its launcher."""

    rank: int
    world_size: int
    local_rank: int

    @classmethod
    def read(cls) -> "RankEnvironment | None":
        """Read torchrun's or srun's environment; None for a process started by hand."""
        env = os.environ
        if "RANK" in env and "WORLD_SIZE" in env:
            rank = int(env["RANK"])
            return cls(rank, int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", rank)))
        # A batch script also has SLURM_PROCID and SLURM_NTASKS; only srun's tasks have a step.
        if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
            return cls(
                int(env["SLURM_PROCID"]),
                int(env["SLURM_STEP_NUM_TASKS"]),
                int(env.get("SLURM_LOCALID", "0")),
            )
        return None
