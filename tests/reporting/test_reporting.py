"""The report of a run: what it reads, what it draws, and a page that needs no other file."""

import json
import math
import os
import re
import threading
import time
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from made_runs import ATTACK, as_lines, completion, levels, make_run
from rich.console import Console

from nemo_care.errors import InputError
from nemo_care.reporting.charts import draw_charts
from nemo_care.reporting.curves import draw_curves
from nemo_care.reporting.page import choose_samples, samples
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


def test_refuses_what_is_not_a_run(tmp_path):
    with pytest.raises(InputError, match="no such directory"):
        read_run(tmp_path / "none")
    with pytest.raises(InputError, match="holds neither"):
        read_run(tmp_path)


def test_names_with_dollars_are_drawn_as_they_are(tmp_path, monkeypatch):
    """matplotlib takes text between dollars for a formula, and fails at one that is none."""
    from matplotlib.text import Text

    names = ("$\\nosuch{$", "a $x^2$ b", "$", "[/x]")
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(as_lines([{"step": 1}]))
    found = {name: levels(0.4)["L1"] for name in names}
    (folder / "validation.jsonl").write_text(
        as_lines({"step": step, "levels": found} for step in (0, 12))
    )
    drawn = {}
    draw = Text.draw

    def recording(self, *arguments, **settings):
        drawn[self.get_text()] = self.get_parse_math()
        return draw(self, *arguments, **settings)

    monkeypatch.setattr(Text, "draw", recording)
    draw_curves(read_run(folder), tmp_path)
    assert set(names) <= drawn.keys()
    assert not any(drawn.values())


def test_follow_writes_the_page_until_the_run_is_finished(tmp_path):
    (tmp_path / "recipe.yaml").write_text("trainer: {max_steps: 3}\n")
    page = tmp_path / "report.html"
    following = threading.Thread(target=follow_report, args=(tmp_path, 1), daemon=True)
    following.start()
    end = time.monotonic() + 60
    while not (page.exists() and page.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    text = page.read_text()
    assert '<meta http-equiv="refresh" content="1">' in text
    assert "Unfinished: 0 of 3 steps so far" in text
    assert "No step is done yet." in text
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 3, "wall_seconds": 75.2}))
    following.join(60)
    assert not following.is_alive()
    assert "refresh" not in page.read_text()
    assert "Finished" in page.read_text()


def test_report_warns_when_the_bonus_no_longer_selects(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        as_lines({"step": step, "care/clipped_rate": 0.97} for step in range(1, 6))
    )
    text = write_report(tmp_path).read_text()
    assert "In the last 5 steps 97% of the answer likelihoods are at the clip (" in text


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
    assert "are at the clip (" not in text
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
        {"step": 1, "reward/accuracy": None, "train/loss": 0.5},
        {"step": 2, "reward/accuracy": 0.75, "train/loss": math.nan, "timing/step": None},
        {"step": 3},
    ]
    (folder / "metrics.jsonl").write_text(as_lines(records))
    text = write_report(folder).read_text()
    assert "Unfinished: 3 of 12 steps so far" in text
    assert {file.stem for file in (folder / "report").glob("*.png")} == {"reward", "training"}
    assert "<title>step 2: 0.75</title>" in text
    assert text.index("<svg") < text.index("<h2>")


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


def test_what_only_some_runs_have_is_drawn_where_it_is(tmp_path):
    """Rewards of the user's own, steps left out, memory and saving."""
    usual = {"reward/total": 1.0, "train/loss": 0.5, "train/bad_steps": 0}
    more = {"reward/mine": -0.5, "train/bad_steps": 1, "memory/process_gib": 0.6}
    widths = {}
    for name, values in (("usual", usual), ("more", usual | more)):
        run = make_run(tmp_path / name, every=100)
        (run / "metrics.jsonl").write_text(as_lines({"step": s, **values} for s in range(1, 6)))
        curves = draw_curves(read_run(run), tmp_path / name)
        widths[name] = {curve.title: curve.width for curve in curves}
    assert widths["more"].keys() - widths["usual"].keys() == {"Memory and saving"}
    # A panel of their own.
    for sheet in ("Reward, accuracy and consistency", "Training"):
        assert widths["more"][sheet] > widths["usual"][sheet]


def test_samples_show_rewards_of_the_users_own(tmp_path):
    file = tmp_path / "step_000001.jsonl"
    file.write_text(as_lines([{**completion(0, 0, -0.25), "reward/mine": -0.5}]))
    ((_, about),) = samples(file)
    assert "reward/mine -0.5" in about
