"""Start W&B's logger as a run does: without a key at a terminal, without a server, and offline.

    python tests/helpers/wandb_program.py FOLDER

writes what happened to FOLDER/met.json.
"""

import json
import os
import pty
import signal
import sys
import threading
import time
from pathlib import Path

from nemo_care.errors import InputError
from nemo_care.recipe.trainer import ExpManagerConfig
from nemo_care.training.experiment import start_experiment
from nemo_care.training.loggers import Loggers


def started(folder: Path) -> str:
    """What the start of a run with W&B says."""
    config = ExpManagerConfig(
        explicit_log_dir=str(folder),
        create_tensorboard_logger=False,
        create_wandb_logger=True,
        wandb_logger_kwargs={"project": "p"},
    )
    try:
        _, (logger,) = start_experiment(config)
    except InputError as error:
        return str(error)
    logger.log_metrics({"a": 1.0}, step=1)
    warnings: list[str] = []
    row = {"prompt_id": "p", "completion": "<b>", "accuracy": 1.0, "answer_likelihood": None}
    Loggers([logger], warnings.append).log_completions([row, row], 1)
    return warnings[0] if warnings else "recorded"


def main() -> None:
    folder = Path(sys.argv[1])
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ["HOME"] = str(folder)
    os.environ["NETRC"] = str(folder / "netrc")
    # A server that nobody has: refused at once, as without a network.
    os.environ.update(WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="3")
    met: dict[str, object] = {}
    # A prompt would wait for ever.
    signal.alarm(120)
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        while True:
            try:
                seen.append(os.read(ours, 4096))
            except OSError:
                return

    threading.Thread(target=read, daemon=True).start()
    stdin, stderr = sys.stdin, sys.stderr
    with open(theirs, closefd=False) as sys.stdin, open(theirs, "w", closefd=False) as sys.stderr:
        assert sys.stdin.isatty()
        assert sys.stderr.isatty()
        began = time.monotonic()
        met["no key"] = started(folder / "no_key")
        met["seconds without a key"] = time.monotonic() - began
    sys.stdin, sys.stderr = stdin, stderr

    import wandb

    os.environ["WANDB_API_KEY"] = "0" * 40
    wandb.teardown()
    met["no server"] = started(folder / "no_server")
    wandb.teardown()
    os.environ["WANDB_MODE"] = "offline"
    met["offline"] = started(folder / "offline")
    wandb.finish()
    met["terminal"] = b"".join(seen).decode(errors="replace")
    (folder / "met.json").write_text(json.dumps(met))


if __name__ == "__main__":
    main()
