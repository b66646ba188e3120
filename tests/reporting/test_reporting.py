import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from made_runs import ATTACK, as_lines, completion, levels, make_run, metric
from rich.console import Console

from nemo_care.errors import InputError
from nemo_care.experiments.compare import compare
from nemo_care.experiments.processes import last_lines
from nemo_care.experiments.training_runs import quoted
from nemo_care.files.json_lines import complete_lines
from nemo_care.process.cores import available_cores
from nemo_care.reporting.charts import draw_charts
from nemo_care.reporting.page import choose_samples
from nemo_care.reporting.report import duration, follow_report, write_report
from nemo_care.reporting.tables import validation_table
from nemo_care.runs.reader import last_step, read_run


class Resources(HTMLParser):
    """Collects what a browser would load, and which tags stand in the page."""

    def __init__(self):
        super().__init__()
        self.loaded = []
        self.tags = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset")]


def test_reads_a_finished_run(tmp_path):
    run = read_run(make_run(tmp_path / "run"))
    assert run.finished
    assert run.last_step == 12
    assert run.steps() == list(range(1, 13))
    assert run.series("timing/step") == [5.0] * 12
    assert run.setting("trainer.seed") == 7
    assert run.setting("trainer.seed.deeper") is None
    assert run.start["L1"]["accuracy"] == 0.4
    assert run.end["L1"]["consistency_rate"] == 0.95
    assert run.skipped[0]["index"] == 3


def test_reads_an_unfinished_run_killed_within_a_line(tmp_path):
    folder = make_run(tmp_path / "run", finished=False)
    whole = json.dumps({"step": 13, "note": "é"}, ensure_ascii=False).encode()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(whole[:-3])  # within the two bytes of é
    run = read_run(folder)
    assert not run.finished
    assert run.last_step == 12
    assert last_step(folder) == 12
    assert run.start["L1"]["accuracy"] == 0.4
    assert run.end["L1"]["accuracy"] == pytest.approx(0.6)


def test_names_a_broken_line_that_is_not_the_last(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2,\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not valid JSON"):
        read_run(folder)


@pytest.mark.parametrize("line", ["[1]", '{"reward/total": 1}'])
def test_refuses_lines_that_are_no_records(tmp_path, line):
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl:1"):
        read_run(folder)


def test_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        read_run(tmp_path / "none")
    with pytest.raises(InputError, match="holds neither"):
        read_run(tmp_path)


def test_a_line_separator_in_a_completion_does_not_cut_the_line(tmp_path):
    folder = make_run(tmp_path / "run")
    rows = complete_lines(folder / "rollouts/step_000001.jsonl")
    assert rows[1]["completion"] == "cut off \u2028 here"


@pytest.mark.parametrize("name", ["$\\nosuch{$", "a $x^2$ b", "$", "[/x]"])
def test_names_with_dollars_are_drawn_as_they_are(tmp_path, monkeypatch, name):
    """matplotlib takes text between dollars for a formula, and fails at one that is none."""
    from matplotlib.text import Text

    folder = make_run(tmp_path / "run")
    file = folder / "validation.jsonl"
    file.write_text(as_lines({"step": s, "levels": {name: levels(0.4)["L1"]}} for s in (0, 12)))
    drawn = []
    draw = Text.draw

    def recording(self, *arguments, **settings):
        drawn.append((self.get_text(), self.get_parse_math()))
        return draw(self, *arguments, **settings)

    monkeypatch.setattr(Text, "draw", recording)
    write_report(folder)
    assert drawn
    assert not [text for text, parsed in drawn if parsed]


def test_report_is_one_page_without_foreign_resources(tmp_path):
    folder = make_run(tmp_path / "my run")
    target = write_report(folder)
    assert target == folder / "report.html"
    text = target.read_text()
    assert ATTACK not in text
    assert "&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;" in text
    assert "&lt;b&gt;bad&lt;/b&gt;" in text
    page = Resources()
    page.feed(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert len(page.loaded) == 6
    assert all(value.startswith("data:image/png;base64,") for value in page.loaded)
    assert not re.search(r"url\(|@import", text)
    assert "0.40 → 0.90" in text
    assert "1 min 15 s" in text
    assert "planted by the warm start" in text
    pictures = sorted((folder / "report").glob("*.png"))
    assert [file.stem for file in pictures] == [
        "care",
        "completions",
        "reward",
        "time",
        "training",
        "validation",
    ]
    for file in pictures:
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size > 5000


def test_report_of_a_run_with_gaps(tmp_path):
    folder = make_run(tmp_path / "run", finished=False, every=100)
    records = [
        {"step": 1, "reward/total": None, "train/loss": 0.5},
        {"step": 2, "reward/total": 1.0, "train/loss": math.nan, "timing/step": None},
        {"step": 3},
    ]
    (folder / "metrics.jsonl").write_text(as_lines(records))
    text = write_report(folder).read_text()
    assert "Unfinished: 3 of 12 steps so far" in text
    assert {file.stem for file in (folder / "report").glob("*.png")} == {"reward", "training"}


def test_report_of_a_run_before_its_first_step(tmp_path):
    (tmp_path / "recipe.yaml").write_text("trainer: {max_steps: 3}\n")
    text = write_report(tmp_path).read_text()
    assert "Unfinished: 0 of 3 steps so far" in text
    assert "No step is done yet." in text


def test_the_curves_that_matter_are_drawn_in_the_page_with_a_value_for_each_step(tmp_path):
    folder = make_run(tmp_path / "run", steps=3)
    records = [
        {"step": 1, "reward/accuracy": 0.25, "timing/rollout": 1.0, "timing/step": 4.0},
        {"step": 2, "reward/accuracy": None, "timing/rollout": 1.5, "timing/step": 4.0},
        {"step": 3, "reward/accuracy": 0.75, "timing/rollout": 2.0, "timing/step": 4.0},
    ]
    (folder / "metrics.jsonl").write_text(as_lines(records))
    accuracy, seconds = draw_charts(read_run(folder))
    assert [text for _, _, text in accuracy.columns] == [
        "step 1: 0.25", "step 2: –", "step 3: 0.75"
    ]  # fmt: skip
    assert accuracy.last == "0.75"
    # Two dots: the step without a value is not bridged.
    assert accuracy.lines[0].path.count("M") == 2
    assert "L" not in accuracy.lines[0].path
    assert [line.label for line in seconds.lines] == ["rollout", "other"]
    assert seconds.columns[0][2] == "step 1: rollout 1, other 3"
    text = write_report(folder).read_text()
    assert "<title>step 3: 0.75</title>" in text
    assert text.index("<svg") < text.index("<h2>")


def test_thousands_of_steps_are_averaged(tmp_path):
    folder = make_run(tmp_path / "run", steps=2)
    (folder / "metrics.jsonl").write_text(
        as_lines({"step": step, "reward/accuracy": (step % 4) / 4} for step in range(1, 2001))
    )
    (accuracy,) = draw_charts(read_run(folder))
    assert len(accuracy.columns) == 400
    assert accuracy.columns[0][2] == "steps 1 to 5, mean: 0.35"
    edges = [(x, width) for x, width, _ in accuracy.columns]
    assert all(x + width == pytest.approx(after, abs=0.2)
               for (x, width), (after, _) in pairwise(edges))  # fmt: skip


def test_follow_writes_the_page_until_the_run_is_finished(tmp_path):
    folder = make_run(tmp_path / "run", finished=False)
    page = folder / "report.html"
    following = threading.Thread(target=follow_report, args=(folder, 1), daemon=True)
    following.start()
    end = time.monotonic() + 60
    while not page.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert '<meta http-equiv="refresh" content="1">' in page.read_text()
    summary = {"steps": 12, "wall_seconds": 75.2, "export": None, "skipped": 1}
    (folder / "summary.json").write_text(json.dumps(summary))
    following.join(60)
    assert not following.is_alive()
    assert "refresh" not in page.read_text()
    assert "Finished" in page.read_text()


def test_report_warns_when_the_bonus_no_longer_selects(tmp_path):
    folder = make_run(tmp_path / "run")
    assert "are at the clip (" not in write_report(folder).read_text()
    (folder / "metrics.jsonl").write_text(
        as_lines({**metric(step), "care/clipped_rate": 0.97} for step in range(1, 6))
    )
    assert "In the last 5 steps 97% of the answer likelihoods" in write_report(folder).read_text()


def test_samples_are_the_extremes_of_the_groups_that_differ_most():
    rows = [completion(0, i, 1.0) for i in range(3)]
    rows += [completion(1, i, reward) for i, reward in enumerate([0.5, 2.5, 0.0])]
    rows += [completion(2, i, reward) for i, reward in enumerate([0.5, None, 1.0])]
    chosen = [(row["prompt_index"], row["reward"]) for row in choose_samples(rows)]
    assert chosen == [(1, 2.5), (1, 0.0), (2, 1.0), (2, 0.5)]
    assert len(choose_samples(rows[:3])) == 1
    assert choose_samples([]) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.31, "0.3 s"), (43.4, "43 s"), (725, "12 min 5 s"), (12000, "3 h 20 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def rendered(table, width=80):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_validation_table():
    text = rendered(validation_table(levels(0.4, 0.77, 0.7), levels(0.98, 0.5, 0.02)))
    assert "0.40 → 0.98" in text
    assert "0.70 → 0.02" in text
    assert "probe true" in text
    assert "– → –" in text  # L2 has no consistency
    assert max(map(len, text.splitlines())) <= 80
    alone = rendered(validation_table(levels(0.4), None))
    assert "0.40" in alone
    assert "→" not in alone
    assert "probe" not in alone


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ending_compare_ends_its_children(tmp_path, fake, number):
    out = tmp_path / "out"
    code = (
        # A shell's background job ignores Ctrl-C, and hands that on to what it starts.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pathlib import Path; from nemo_care.experiments.compare import compare; "
        f"compare(['slow'], [1], Path({str(out)!r}), [], 1, None, train_command={fake!r})"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    pid_file = out / "slow-seed1" / "pid"
    until = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    child = int(pid_file.read_text())
    parent.send_signal(number)
    assert parent.wait(20) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_report_shows_rewards_of_the_users_own(tmp_path):
    from PIL import Image

    width = {}
    for name, own in (("plain", {}), ("own", {"reward/mine": -0.5, "reward/total": -0.25})):
        folder = make_run(tmp_path / name)
        (folder / "metrics.jsonl").write_text(
            as_lines({**metric(step), **own} for step in range(1, 6))
        )
        rollouts = folder / "rollouts" / "step_000001.jsonl"
        rollouts.write_text(as_lines([{**completion(0, 0, -0.25), **own}]))
        text = write_report(folder).read_text()
        assert ("reward/mine -0.5" in text) == bool(own)
        width[name] = Image.open(folder / "report" / "reward.png").width
    # A panel of their own.
    assert width["own"] > width["plain"]


def test_steps_left_out_are_drawn_where_there_are_any(tmp_path):
    from PIL import Image

    width = {}
    for bad in (0, 1):
        folder = make_run(tmp_path / str(bad))
        (folder / "metrics.jsonl").write_text(
            as_lines({**metric(step), "train/bad_steps": bad * step} for step in range(1, 6))
        )
        write_report(folder)
        width[bad] = Image.open(folder / "report" / "training.png").width
    assert width[1] > width[0]


def test_memory_and_the_time_of_saving_have_a_picture_of_their_own(tmp_path):
    folder = make_run(tmp_path / "run")
    assert "Memory and saving" not in write_report(folder).read_text()
    more = {"memory/process_gib": 0.6, "memory/gpu_gib": None, "timing/checkpoint": 0.2}
    (folder / "metrics.jsonl").write_text(as_lines({**metric(s), **more} for s in range(1, 6)))
    assert "Memory and saving" in write_report(folder).read_text()
