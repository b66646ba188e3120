"""A Slurm cluster of two nodes, both on this machine, for tests of slurm/."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
# Debian's directory of daemons, which is not on every user's path.
_PATH = f"{os.environ['PATH']}:/usr/sbin"
# Jobs share the nodes, although the scripts request them exclusively: they mostly wait.
_CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldParameters=enable_configless
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,bf_interval=1,sched_interval=2
MpiDefault=none
ReturnToService=2
KillWait=60
MinJobAge=600
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=2000
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=2000
PartitionName=main Nodes=ALL Default=YES MaxTime=60 OverSubscribe=FORCE:16
"""


def missing() -> str | None:
    """Return why no cluster can be started here, or None."""
    lacking = [name for name in _PROGRAMS if shutil.which(name, path=_PATH) is None]
    if lacking:
        return f"no {', '.join(lacking)} here: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "slurmd has to run as root"


class Cluster:
    """A running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {
            "PATH": _PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def run(self, *command: str, **variables: str) -> str:
        """Run a client of Slurm; return its output."""
        done = subprocess.run(
            command,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def submit(self, *arguments: str, **variables: str) -> str:
        """Submit a job; return its number."""
        return self.run("sbatch", "--parsable", *arguments, **variables)

    def job(self, number: str) -> dict[str, str]:
        """Return the output of `scontrol show job` as a dictionary."""
        words = self.run("scontrol", "show", "job", "-o", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, *states: str, seconds: float = 150) -> dict[str, str]:
        """Wait until a job is in one of the states; without any, until it has ended."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} is {job['JobState']} ({job['Reason']})")
            time.sleep(0.2)
        return job

    def start_again(self, number: str, restarts: int) -> None:
        """Wait until a job has been requeued `restarts` times, and make it start at once."""
        deadline = time.monotonic() + 150
        while (job := self.job(number))["Restarts"] != str(restarts) or (
            job["JobState"] != "PENDING"
        ):
            if time.monotonic() > deadline or job["JobState"] == "FAILED":
                raise TimeoutError(f"job {number} is {job['JobState']}, not requeued")
            time.sleep(0.1)
        # Slurm would delay it by two minutes. Within the first second, the nodes refuse it.
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now+2")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster with the nodes node1 and node2, with its files in `folder`."""
    controller, first, second = _free_ports(3)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(
        _CONFIGURATION.format(folder=folder, controller=controller, first=first, second=second)
    )
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o400)
    made = Cluster(folder)
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in (
        "key-file", "socket", "pid-file", "log-file", "seed-file"
    )]  # fmt: skip
    commands = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-N", "node1"],
        ["slurmd", "-D", "-N", "node2"],
    ]
    daemons: list[subprocess.Popen] = []
    try:
        for place, command in enumerate(commands):
            with (folder / f"daemon.{place}").open("w") as output:
                daemons.append(
                    subprocess.Popen(
                        command, env=made.environment, stdout=output, stderr=output, text=True
                    )
                )
            if place == 0:
                _wait_for(lambda: (folder / "munge.socket").exists(), "munged")
        _wait_for(lambda: _idle(made) == 2, f"two idle nodes; see {folder}")
        yield made
    finally:
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            made.run("scancel", "--partition=main", "--full", "--signal=KILL")
            made.run("scancel", "--partition=main")
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()


def _idle(made: Cluster) -> int:
    try:
        return int(made.run("sinfo", "--noheader", "--states=idle", "--format=%D") or 0)
    except RuntimeError:
        return 0


def _wait_for(ready, what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Slurm does not start: no {what}")
        time.sleep(0.1)
