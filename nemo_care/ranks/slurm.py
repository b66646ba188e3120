"""Read srun's environment: whether a task is one rank or starts the ranks of its machine."""

import os
from dataclasses import dataclass

from nemo_care.errors import InputError


@dataclass(frozen=True)
class Node:
    """This machine among those of a run, and the address where their starters meet."""

    place: int
    """Starter 0 holds the rendezvous."""
    count: int
    name: str
    address: str
    """Address on which starter 0 listens."""
    port: int
    run_id: str
    """The same on all machines, and different for each start of the job."""


def node_to_start(devices: int, num_nodes: int) -> Node | None:
    """Return this machine if srun started one task on it, which has to start `devices` ranks.

    None: srun started a task per rank, or this process is not a task of srun.

    Raises:
        InputError: srun started a different number of tasks.
    """
    env = os.environ
    # Ranks started by a starter have srun's variables too.
    if "RANK" in env or "SLURM_STEP_NUM_TASKS" not in env:
        return None
    tasks, machines = int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_STEP_NUM_NODES"])
    if tasks == devices * num_nodes:
        return None
    if not tasks == machines == num_nodes:
        raise InputError(
            f"srun started {tasks} tasks on {machines} machines, but trainer.devices={devices} "
            f"and trainer.num_nodes={num_nodes}: srun must start one task per machine "
            f"(--nodes={num_nodes} --ntasks-per-node=1) or one task per rank "
            f"(--ntasks-per-node={devices})"
        )
    address, port = rendezvous_address()
    return Node(
        place=int(env["SLURM_NODEID"]),
        count=machines,
        name=env["SLURMD_NODENAME"],
        address=address,
        port=port,
        run_id=f"{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}.{_restarts()}",
    )


def rendezvous_address() -> tuple[str, int]:
    """Return host and port at which the ranks or starters of a step meet.

    MASTER_ADDR and MASTER_PORT if set (slurm/common.sh does), otherwise the step's first machine
    and a port derived from the job.
    """
    from lightning.fabric.plugins.environments import SLURMEnvironment

    env = os.environ
    address = env.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(
        env["SLURM_STEP_NODELIST"]
    )
    # Below the ports that Linux uses for outgoing connections (from 32768).
    derived = 15000 + (int(env["SLURM_JOB_ID"]) + _restarts()) % 15000
    return address, int(env.get("MASTER_PORT") or derived)


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))
