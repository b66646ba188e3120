"""Loggers: none ends a run or costs it a record, and W&B starts before the first step or not."""

import io
import json
import os
import pty
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from small_runs import small_recipe, small_trainer

from nemo_care.data.samples import Skipped
from nemo_care.errors import InputError
from nemo_care.recipe.trainer import ExpManagerConfig
from nemo_care.runs.metrics import STEP_TIME
from nemo_care.training.console import Console
from nemo_care.training.experiment import check_loggers, start_experiment
from nemo_care.training.loggers import Loggers


class Recorder:
    """A logger that keeps the steps it was given, and fails where it is asked to."""

    def __init__(self, fails=lambda step: False) -> None:
        self.steps: list[int | None] = []
        self.fails = fails

    def log_metrics(self, metrics, step=None):
        metrics["changed by the logger"] = 1.0
        self.steps.append(step)
        if self.fails(step):
            raise ConnectionError("the server\nis gone")


def test_a_failing_logger_warns_once_and_the_others_get_every_step():
    warnings: list[str] = []
    broken, healthy = Recorder(lambda step: True), Recorder()
    loggers, metrics = Loggers([broken, healthy], warnings.append), {"a": 1.0}
    for step in range(1, 21):
        loggers.log(metrics, step)
    assert healthy.steps == [*range(1, 21)]
    assert metrics == {"a": 1.0}
    # Left out for 1, 2, 4 and 8 calls after each failure.
    assert broken.steps == [1, 3, 6, 11, 20]
    (warning,) = warnings
    assert "Recorder" in warning
    assert "ConnectionError: the server is gone" in warning
    assert warning.startswith("step 1: ")


def test_a_logger_that_recovers_gets_every_step_again():
    logger = Recorder(lambda step: step in (2, 4))
    loggers = Loggers([logger], lambda text: None)
    for step in range(1, 12):
        loggers.log({}, step)
    assert logger.steps == [1, 2, 4, 7, 8, 9, 10, 11]


def test_a_run_goes_on_without_its_logger_and_records_each_step_before_it_logs(
    checkpoint, world, ranks, tmp_path, capsys
):
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 3
    recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    trainer = small_trainer(recipe, ranks, tmp_path, saves=False)
    recorded = []

    def looks(step):
        """Note what is on the disk when a logger is called; never fail."""
        metrics = (tmp_path / "metrics.jsonl").read_text().splitlines() if step else []
        recorded.append((step, len(metrics), len([*(tmp_path / "rollouts").iterdir()])))
        return False

    trainer.loggers = Loggers([Recorder(lambda step: True), Recorder(looks)], trainer.console.warn)
    summary = trainer.fit()
    assert summary["steps"] == 3
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").open()]
    assert steps == [1, 2, 3]
    # The validations before the first step and after the last are logged too.
    assert recorded == [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3), (3, 3, 3)]
    assert capsys.readouterr().out.count("could not record the metrics") == 1


def test_tensorboard_on_a_full_disk_is_one_warning_without_a_traceback(tmp_path, capfd):
    """A real writer, whose thread meets the end of the disk."""
    _, (logger,) = start_experiment(ExpManagerConfig(explicit_log_dir=str(tmp_path / "run")))
    writer = logger.experiment._get_file_writer().event_writer._async_writer
    writer._writer._writer = io.FileIO("/dev/full", "w")
    warnings: list[str] = []
    loggers = Loggers([logger], warnings.append)
    loggers.log({"a": 1.0, "b": 2.0}, 1)
    writer._worker.join(timeout=10)
    loggers.log({"a": 1.0}, 2)
    loggers.log({"a": 1.0}, 3)
    loggers.log({"a": 1.0}, 4)
    (warning,) = warnings
    assert "TensorBoardLogger" in warning
    assert "No space left on device" in warning
    assert "Traceback" not in capfd.readouterr().err


HOSTILE = (
    "<script>alert(1)</script> [bold]x[/bold] **y** | \x1b[2J \u202egpj.exe שלום\n\n# two "
    "<answer>B</answer>"
)


def hostile_row():
    return {"prompt_id": HOSTILE, "question": HOSTILE, "solution": "B", "completion": HOSTILE,
            "accuracy": 1.0, "answer_likelihood": None, "bonus": 0.5, "reward": 2.5,
            "advantage": 1.25}  # fmt: skip


def test_tensorboard_gets_a_table_of_completions_in_which_text_stays_text(tmp_path):
    """As TensorBoard itself draws what it reads back."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugin_util import markdown_to_safe_html

    _, (logger,) = start_experiment(ExpManagerConfig(explicit_log_dir=str(tmp_path / "run")))
    warnings: list[str] = []
    Loggers([logger], warnings.append).log_completions([hostile_row()] * 2, 7)
    logger.experiment.flush()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (event,) = events.Tensors("completions/text_summary")
    assert event.step == 7
    page = markdown_to_safe_html(event.tensor_proto.string_val[0])
    assert warnings == []
    assert page.count("<tr>") == 3
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; [bold]x[/bold] **y** | \\x1b[2J") == 6
    assert "&lt;answer&gt;B&lt;/answer&gt;" in page
    assert not {"\x1b", "\u202e"} & set(page)
    assert "<h1" not in page
    assert "1.25" in page


def test_wandb_gets_the_same_table():
    class Tables(Recorder):
        def log_table(self, key, columns, data, step):
            self.table = (key, columns, data, step)

    logger = Tables()
    Loggers([logger], lambda text: None).log_completions([hostile_row()], 7)
    key, columns, (cells,), step = logger.table
    assert (key, step) == ("completions", 7)
    row = dict(zip(columns, cells, strict=True))
    assert row["completion"].startswith("<script>alert(1)</script> [bold]x[/bold] **y** | \\x1b[2J")
    assert row["likelihood"] is None
    assert row["advantage"] == 1.25


def test_hostile_completions_are_text_on_the_console(checkpoint, world, capsys):
    console = Console(small_recipe(checkpoint, world), active=True)
    row = {**hostile_row(), "format": 1.0}
    skipped = [Skipped(1, HOSTILE, HOSTILE)]
    console.step(1, {STEP_TIME: 1.0}, [row], skipped)
    shown = capsys.readouterr().out
    assert shown.count("[bold]x[/bold]") == 4
    assert shown.count("\\x1b[2J") == 4
    assert not {"\x1b", "\u202e"} & set(shown)
    assert "<script>alert(1)</script>" in shown


def test_loggers_without_their_package_or_project_are_refused_at_once(monkeypatch):
    with pytest.raises(InputError, match=r"wandb_logger_kwargs\.project=PROJECT"):
        check_loggers(ExpManagerConfig(create_wandb_logger=True))
    monkeypatch.setattr("nemo_care.training.experiment.find_spec", lambda name: None)
    for name in ("wandb", "mlflow"):
        with pytest.raises(InputError, match=f"create_{name}_logger=true needs .*pip install"):
            check_loggers(ExpManagerConfig(**{f"create_{name}_logger": True}))


def started_with_wandb(folder: Path) -> str:
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


def start_wandb(folder: Path) -> dict:
    """What happens at a terminal without a key, and offline."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ["HOME"] = str(folder)
    os.environ["NETRC"] = str(folder / "netrc")
    # A server that nobody has: refused at once, as without a network.
    os.environ.update(WANDB_BASE_URL="http://127.0.0.1:9", WANDB_INIT_TIMEOUT="1")
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
        met["no key"] = started_with_wandb(folder / "no_key")
        met["seconds without a key"] = time.monotonic() - began
    sys.stdin, sys.stderr = stdin, stderr

    import wandb
    from wandb.sdk.data_types._private import MEDIA_TMP

    # Another process that was forked with it may have removed it at its end.
    os.makedirs(MEDIA_TMP.name, exist_ok=True)
    wandb.teardown()
    os.environ["WANDB_MODE"] = "offline"
    met["offline"] = started_with_wandb(folder / "offline")
    wandb.finish()
    met["terminal"] = b"".join(seen).decode(errors="replace")
    return met


def test_wandb_starts_before_the_first_step_or_is_refused_with_the_remedy(on_ranks, tmp_path):
    """The real package."""
    pytest.importorskip("wandb")
    (met,) = on_ranks(None, start_wandb, tmp_path)
    refused = met["no key"]
    assert refused.startswith("exp_manager.create_wandb_logger=true: WandbLogger can't start")
    assert "\n" not in refused
    for remedy in ("wandb login", "WANDB_API_KEY", "WANDB_MODE=offline"):
        assert remedy in refused
    assert met["seconds without a key"] < 30
    assert met["offline"] == "recorded"
    assert list(tmp_path.glob("offline/logs/wandb/offline-run-*/run-*.wandb"))
    (table,) = tmp_path.glob(
        "offline/logs/wandb/offline-run-*/files/media/table/completions_*.json"
    )
    assert [row[3] for row in json.loads(table.read_text())["data"]] == ["<b>", "<b>"]
    assert "Traceback" not in met["terminal"]
