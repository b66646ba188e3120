"""Start ranks within a second, by forking a process that has imported everything.

    python rank_server.py [MODULE ...]

It calls `install` of the modules before it imports anything else. Then it reads one JSON object per
line. {"arguments": as after python, "environment": {...}, "folder": the working directory, "out"
and "errors": files, "fault": null or an argument of injections.py} forks a rank, and the reply is
its process id; the reply to {"wait": pid, "seconds": s} is the exit status (of a signal: its
negative number), or null if the process still runs after that time. The server exits, and kills
the remaining ranks, when its input ends. `forked_ranks.py` is its client.
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time

from nemo_care.megatron.imports import import_lightly
from nemo_care.process.quiet import quiet_libraries


def _import_everything() -> None:
    quiet_libraries()
    import_lightly()
    import nemo.core.config
    import nemo.utils.exp_manager

    import nemo_care.checks.recipe
    import nemo_care.commands.evaluate
    import nemo_care.commands.train
    import nemo_care.training.build

    del nemo, nemo_care


def _wait(pid: int, seconds: float) -> int | None:
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.01)


def _be_rank(job: dict) -> None:
    """Run the job in the forked process."""
    with open(job["out"], "ab") as out, open(job["errors"], "ab") as errors:
        os.dup2(out.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    if job["fault"]:
        from injections import inject

        inject(**job["fault"])
    option, *rest = job["arguments"]
    if option == "-m":
        module, *rest = rest
        sys.argv = [module, *rest]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [option, *rest]
        runpy.run_path(option, run_name="__main__")


def main() -> None:
    for name in sys.argv[1:]:
        importlib.import_module(name).install()
    _import_everything()
    # Megatron collects garbage whenever it saves: exclude the imported objects.
    gc.freeze()
    # Signals that terminals and launchers send to a whole process group are not for the server.
    os.setsid()
    answers = os.fdopen(os.dup(1), "w")
    running: set[int] = set()
    ended: dict[int, int] = {}
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            pid = job["wait"]
            status = ended[pid] if pid in ended else _wait(pid, job["seconds"])
            if status is not None:
                running.discard(pid)
                ended[pid] = status
            print(json.dumps(status), file=answers, flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            answers.close()
            _be_rank(job)
            return
        running.add(pid)
        print(pid, file=answers, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
