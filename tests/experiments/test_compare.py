"""`nemo-care compare`: which runs are trained, and what the table says of them."""

import json
import math
import os
import signal
import sys
import time

import pytest

from nemo_care.errors import InputError
from nemo_care.experiments.compare import compare
from nemo_care.experiments.processes import last_lines
from nemo_care.experiments.training_runs import quoted
from nemo_care.files.json_lines import complete_lines
from nemo_care.process.cores import available_cores

# A stand-in for training: writes what a run leaves behind. "broken" fails; "slow" waits.
FAKE = """
import json, os, pathlib, sys, time
args = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
recipe = sys.argv[sys.argv.index("--config-name") + 1]
folder = pathlib.Path(args["exp_manager.explicit_log_dir"].strip("'"))
folder.mkdir(parents=True, exist_ok=True)
seed = int(args["trainer.seed"])
steps = int(args.get("trainer.max_steps", 2))
with (folder.parent / "calls.txt").open("a") as calls:
    calls.write(f"{folder.name} {os.environ['OMP_NUM_THREADS']}\\n")
print("starting", recipe, flush=True)
with (folder / "metrics.jsonl").open("w") as file:
    for step in range(1, steps + 1):
        file.write(json.dumps({"step": step}) + "\\n")
if recipe == "broken" and seed == 1:
    sys.exit("CUDA went home")
if recipe == "slow":
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
def level(a, c, p):
    return {"L1": {"accuracy": a, "consistency_rate": c, "format_rate": 1, "probe_implied": p},
            "L3": {"accuracy": a / 2, "consistency_rate": None, "format_rate": 1}}
end = level(0.9 + seed / 100, 0.4 if recipe == "grpo" else 0.98, 0.02)
(folder / "summary.json").write_text(json.dumps({"steps": steps, "wall_seconds": 1.0,
    "export": None, "skipped": 0, "start": level(0.47, 0.77, 0.7), "end": end}))
"""


@pytest.fixture
def fake(tmp_path):
    script = tmp_path / "fake_train.py"
    script.write_text(FAKE)
    return [sys.executable, str(script)]


def calls(out):
    file = out / "calls.txt"
    return sorted(file.read_text().splitlines()) if file.exists() else []


def test_compare_trains_all_and_writes_the_table(tmp_path, fake, capsys):
    out = tmp_path / "with space"
    failures = compare(["grpo", "care"], [1, 3], out, ["a.b=1"], 2, None, train_command=fake)
    assert failures == []
    threads = max(1, available_cores() // 2)
    names = ["care-seed1", "care-seed3", "grpo-seed1", "grpo-seed3"]
    assert calls(out) == [f"{name} {threads}" for name in names]
    assert "starting care" in (out / "logs/care-seed3.log").read_text()

    table = (out / "comparison.md").read_text()
    assert (
        "| run | seed | L1 accuracy | L3 accuracy | L1 consistency | L3 consistency "
        "| L1 probe implied |" in table
    )
    assert "| start | all | 0.47 | 0.23 | 0.77 | – | 0.70 |" in table
    assert "| grpo | 3 | 0.93 | 0.47 | 0.40 | – | 0.02 |" in table
    assert "| **care** | **mean** | **0.92 ± 0.01** |" in table
    assert "`a.b=1`" in table

    record = json.loads((out / "comparison.json").read_text())
    assert [run["folder"] for run in record["runs"]] == [*names[2:], *names[:2]]
    accuracy = record["summary"]["care"]["end"]["L1"]["accuracy"]
    assert accuracy["mean"] == pytest.approx(0.92)
    assert accuracy["std"] == pytest.approx(math.sqrt(2) * 0.01)
    assert accuracy["seeds"] == 2

    results = complete_lines(out / "results.jsonl")
    assert [(one["variant"], one["seed"]) for one in results] == [
        ("grpo", 1), ("grpo", 3), ("care", 1), ("care", 3),
    ]  # fmt: skip

    printed = capsys.readouterr()
    assert "grpo-seed3: done, 2 steps" in printed.err
    shown = [line.split() for line in printed.out.splitlines()]
    assert shown[1:4] == [
        ["L1", "L3", "L1", "L3", "L1"],
        ["run", "seed", "acc", "acc", "cons", "cons", "probe"],
        ["─" * 46],
    ]
    assert shown[4:11] == [
        ["start", "all", "0.47", "0.23", "0.77", "–", "0.70"],
        [],
        ["grpo", "1", "0.91", "0.46", "0.40", "–", "0.02"],
        ["3", "0.93", "0.47", "0.40", "–", "0.02"],
        ["mean", "0.92", "0.46", "0.40", "–", "0.02"],
        ["±0.01", "±0.01", "±0.00", "±0.00"],
        [],
    ]


def test_compare_shows_where_each_recipe_started_where_they_differ(tmp_path, fake):
    text = (tmp_path / "fake_train.py").read_text()
    start = "level(0.47, 0.77, 0.7)"
    assert start in text
    (tmp_path / "fake_train.py").write_text(
        text.replace(start, "level(0.47 + (recipe == 'care') * seed / 100, 0.77, 0.7)")
    )
    out = tmp_path / "out"
    assert compare(["grpo", "care"], [3, 1], out, [], 2, None, train_command=fake) == []
    table = (out / "comparison.md").read_text()
    assert [line[:30] for line in table.splitlines() if "start of" in line] == [
        "| start of grpo | all | 0.47 |",
        "| start of care | 1 | 0.48 | 0",
        "| start of care | 3 | 0.50 | 0",
        "| **start of care** | **mean**",
    ]


def test_compare_goes_on_where_it_stopped(tmp_path, fake):
    out = tmp_path / "out"
    compare(["grpo"], [1], out, [], 1, None, train_command=fake)
    compare(["grpo"], [1, 2], out, [], 1, None, train_command=fake)
    assert [call.split()[0] for call in calls(out)] == ["grpo-seed1", "grpo-seed2"]
    # More steps than before: both go on.
    compare(["grpo"], [1, 2], out, ["trainer.max_steps=5"], 1, None, train_command=fake)
    assert len(calls(out)) == 4
    record = json.loads((out / "comparison.json").read_text())
    assert [run["steps"] for run in record["runs"]] == [5, 5]
    with pytest.raises(InputError, match="different overrides"):
        compare(["grpo"], [1], out, ["optimizer.lr=1"], 1, None, train_command=fake)


def test_compare_names_a_failure_and_goes_on(tmp_path, fake, capsys):
    out = tmp_path / "out"
    failures = compare(["broken"], [1, 2], out, [], 1, None, train_command=fake)
    assert [(failure.name, failure.status) for failure in failures] == [("broken-seed1", 1)]
    assert failures[0].last_lines[-1] == "CUDA went home"
    printed = capsys.readouterr()
    assert "broken-seed1: failed (exit status 1)" in printed.err
    assert "CUDA went home" in printed.err
    table = (out / "comparison.md").read_text()
    assert "| broken | 1: failed | – |" in table
    assert "| **broken** | **mean of 1** | **0.92** |" in table


def test_compare_does_not_believe_a_run_without_a_summary(tmp_path):
    nothing = [sys.executable, "-c", "print('hello')"]
    failures = compare(["care"], [1], tmp_path / "out", [], 1, None, train_command=nothing)
    assert failures[0].last_lines == ["hello", "the command ended without writing summary.json"]


@pytest.mark.parametrize(
    ("recipes", "seeds", "overrides", "jobs", "named"),
    [
        ([], [1], [], 1, "recipes"),
        (["care"], [], [], 1, "--seeds"),
        (["care"], [1], [], 0, "--jobs=0"),
        (["care"], [1], ["trainer.seed=3"], 1, "--seeds"),
        (["care"], [1], ["++exp_manager.explicit_log_dir=x"], 1, "--out"),
        (["care"], [1], ["trainer.max_steps=many"], 1, "number of steps"),
    ],
)
def test_compare_refuses_what_can_not_work(tmp_path, recipes, seeds, overrides, jobs, named):
    with pytest.raises(InputError, match=named):
        compare(recipes, seeds, tmp_path / "out", overrides, jobs, None)
    assert not (tmp_path / "out").exists()


def test_paths_are_quoted_as_hydra_reads_them():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for path in ("/runs/care-seed1", "/my runs/it's, a=b/x", "C:/a b/(1)"):
        override = parser.parse_override("key=" + quoted(path))
        assert override.value() == path


def test_last_lines_shows_a_progress_bar_once(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"one\r\n\n 10%\r 50%\r100%\nerror: \xff\n")
    assert last_lines(log) == ["one", "100%", "error: �"]
    assert last_lines(tmp_path / "none") == []


def test_ending_compare_ends_its_children(tmp_path, fake, rank_server):
    out, script = tmp_path / "out", tmp_path / "compare.py"
    script.write_text(
        "from pathlib import Path; from nemo_care.experiments.compare import compare\n"
        f"compare(['slow'], [1], Path({str(out)!r}), [], 1, None, train_command={fake!r})\n"
    )
    parent = rank_server.start(1, [str(script)])
    pid_file = out / "slow-seed1" / "pid"
    until = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    child = int(pid_file.read_text())
    os.kill(parent.pids[0], signal.SIGTERM)
    assert parent.wait() == [143]
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
