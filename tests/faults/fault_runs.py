"""Runs of the train command whose ranks are real processes, and what the tests ask about them."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from forked_ranks import PATIENCE, ForkedRanks, RankServer

STEPS = 6

# A step takes a fifth of a second, a start some seconds.
SETTINGS = (
    f"trainer.max_steps={STEPS}",
    "algorithm.group_size=4",
    "algorithm.prompts_per_step=4",
    "algorithm.groups_per_micro_batch=1",
    "algorithm.reference.ema_update_every=1",
    "rollout.groups_per_batch=2",
    "optimizer.warmup_steps=0",
    "checkpoint.save_interval=2",
    "checkpoint.keep_last=2",
    "checkpoint.export=false",
    "data.validation.annotations=null",
    "exp_manager.create_tensorboard_logger=false",
)
LAYOUTS = {
    "one": (1, ()),
    "DP 2": (2, ()),
    "TP 2": (2, ("model.tensor_model_parallel_size=2",)),
    "PP 2": (2, ("model.pipeline_model_parallel_size=2",)),
}


class Start:
    """One start of a run: its ranks, and their descendants as seen while they ran."""

    def __init__(self, ranks: ForkedRanks, patience: float) -> None:
        self.ranks = ranks
        self.patience = patience
        self.began = time.monotonic()
        self._descendants: list[psutil.Process] = []

    def signal(self, number: int, rank: int) -> None:
        """Send a signal to a rank."""
        os.kill(self.ranks.pids[rank], number)

    def wait(self) -> list[int]:
        """Exit status of each rank."""
        for pid in self.ranks.pids:
            try:
                self._descendants += psutil.Process(pid).children(recursive=True)
            except psutil.NoSuchProcess:
                continue
        return self.ranks.wait(self.patience)

    def alive(self) -> bool:
        """Whether the first rank still runs."""
        return psutil.pid_exists(self.ranks.pids[0])

    def left_over(self) -> list[psutil.Process]:
        """Descendants of the ranks that outlive them by ten seconds."""
        return psutil.wait_procs(self._descendants, timeout=10)[1]


@dataclass
class Run:
    """A run directory and the commands that worked in it."""

    server: RankServer
    folder: Path
    world: Path
    settings: Sequence[str] = SETTINGS
    patience: float = PATIENCE  # seconds; what takes longer hangs
    last: Start = field(init=False)

    def command(self, layout: str, *overrides: str) -> list[str]:
        """What to give to python, on every rank or to start them."""
        count, keys = LAYOUTS[layout]
        return [
            *("-m", "nemo_care.train", "--config-name", "tiny_cpu", *self.settings),
            *(f"trainer.devices={count}", *keys),
            *("data.train.kind=jsonl", f"data.train.root={self.world}"),
            f"exp_manager.explicit_log_dir={self.folder}",
            *overrides,
        ]

    def start(
        self, layout: str = "one", *overrides: str, fault: dict[str, Any] | None = None
    ) -> Start:
        """Start the ranks of a layout (see LAYOUTS)."""
        command = self.command(layout, *overrides)
        self.last = Start(self.server.start(LAYOUTS[layout][0], command, fault), self.patience)
        return self.last

    def wait_for_step(self, step: int) -> None:
        """Until the metrics of that step, or of a later one, are written."""
        deadline = time.monotonic() + self.patience
        while max(self.steps(), default=0) < step:
            assert time.monotonic() < deadline, f"no step {step}:\n{self.output()}"
            time.sleep(0.05)

    def finish(self, layout: str = "one", *overrides: str) -> float:
        """Start once more, until the run is done; seconds from there to the first new step."""
        saved = max(self.checkpoints(), default=0)
        done = max(self.steps(), default=0)
        start = self.start(layout, *overrides)
        # Steps behind the checkpoint come again: first they vanish.
        while saved < done == max(self.steps(), default=0) and start.alive():
            time.sleep(0.01)
        self.wait_for_step(saved + 1)
        seconds = time.monotonic() - start.began
        assert set(start.wait()) == {0}, self.output()
        return seconds

    def records(self) -> list[dict[str, Any]]:
        """The records of the steps so far."""
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return []
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]]

    def metrics(self) -> list[dict[str, Any]]:
        """The records without times and memory."""
        other = ("timing/", "data/worker", "memory/")
        return [
            {key: value for key, value in record.items() if not key.startswith(other)}
            for record in self.records()
        ]

    def steps(self) -> list[int]:
        """The steps in metrics.jsonl."""
        return [record["step"] for record in self.records()]

    def rollouts(self) -> list[str]:
        """The completions of all steps, as written."""
        return [file.read_text() for file in sorted((self.folder / "rollouts").iterdir())]

    def state(self) -> dict[str, str]:
        """Checksums of the last checkpoint's tensors."""
        last = self.folder / f"checkpoints/step_{self.checkpoints()[-1]:06d}"
        files = json.loads((last / "manifest.json").read_text())["files"]
        return {name: file["sha256"] for name, file in files.items() if name.endswith(".distcp")}

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints."""
        folder = self.folder / "checkpoints"
        names = [path.name for path in folder.glob("step_*")] if folder.exists() else []
        return sorted(int(name[5:]) for name in names if name[5:].isdigit())

    def output(self) -> str:
        """What the ranks of the last start printed."""
        return self.last.ranks.output()


def assert_equal_runs(run: Run, whole: Run) -> None:
    """Every step once, with the same metrics, completions and state at the end, bit for bit."""
    assert run.steps() == [*range(1, len(run.steps()) + 1)]
    assert run.metrics() == whole.metrics()
    assert run.rollouts() == whole.rollouts()
    assert run.state() == whole.state()
