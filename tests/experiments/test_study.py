"""`nemo-care study`: what is run, what is refused, what comes out."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

from nemo_care.commands.study import main, run_study
from nemo_care.errors import InputError
from nemo_care.experiments.config import Study, Variant, find_study, read_study
from nemo_care.experiments.docs import filled_page
from nemo_care.experiments.figures import draw_curves
from nemo_care.experiments.findings import Findings
from nemo_care.experiments.results import check_results, read_result, read_results
from nemo_care.experiments.runs import study_runs
from nemo_care.experiments.tables import contrasts_sheet, main_sheet, seeds_sheet
from nemo_care.experiments.training_runs import TrainingRun
from nemo_care.files.json_lines import complete_lines

DOCS = Path(__file__).parents[2] / "docs"
STUDIES = Path(__file__).parents[2] / "recipes" / "studies"

# A stand-in for training: writes what a run leaves behind. Seed 3 of "grpo" fails.
FAKE = """
import json, os, pathlib, sys, time
args = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
folder = pathlib.Path(args["exp_manager.explicit_log_dir"].strip("'"))
folder.mkdir(parents=True, exist_ok=True)
seed, steps = int(args["trainer.seed"]), int(args["trainer.max_steps"])
with (folder.parent / "calls.txt").open("a") as calls:
    calls.write(folder.name + "\\n")
(folder / "recipe.yaml").write_text("data: {train: {kind: miniature}}")
is_grpo = args.get("+ablation") == "grpo"
if is_grpo and seed == 3 and not (folder.parent / "repaired").exists():
    sys.exit("CUDA went home")
if seed == 2 and (folder.parent / "wait").exists():
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)
with (folder / "metrics.jsonl").open("w") as file:
    for step in range(1, steps + 1):
        file.write(json.dumps({"step": step, "timing/step": 0.5 + seed,
            "rollout/consistency_rate": (0.4 if is_grpo else 0.9) + step / 1000,
            "reward/accuracy": step / steps, "care/answer_likelihood": None}) + "\\n")
def levels(a, c, p):
    return {name: {"accuracy": a - i / 10, "consistency_rate": c - i / 10, "format_rate": 1.0,
        "count": 256, "consistency_among_correct": c, "reasoning_words": 10.0 + seed,
        "probe_implied": p, "probe_true": 1 - p} for i, name in enumerate(("L1", "L2", "L3"))}
care = {1: 0.98, 2: 0.94, 3: 0.90}[seed]
end = levels(0.9, {1: 0.5, 2: 0.4, 3: 0.3}[seed] if is_grpo else care, 0.02)
(folder / "summary.json").write_text(json.dumps({"steps": steps, "wall_seconds": 60.0 + seed,
    "start": levels(0.5, 0.8, 0.7), "end": end}))
"""

STUDY = """
title: Two ways
recipe: tiny_cpu
seeds: [1, 2]
overrides: [trainer.max_steps=120]
variants:
  grpo:
    title: GRPO
    overrides: [+ablation=grpo]
    seeds: [1, 2, 3]
    about: No bonus.
  care:
contrasts:
  - {left: care, right: grpo, about: The bonus.}
curves: [grpo, care]
"""


class World:
    """A folder with a study, and a train command that trains nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out put"
        self.file = folder / "mine.yaml"
        self.file.write_text(STUDY)
        script = folder / "fake_train.py"
        script.write_text(FAKE)
        self.command = [sys.executable, str(script)]

    def run(self, **options):
        return run_study(
            "mine",
            self.out,
            config_dir=str(self.folder),
            train_command=self.command,
            **{"jobs": 2, **options},
        )

    def calls(self) -> list[str]:
        file = self.out / "runs/calls.txt"
        return sorted(file.read_text().split()) if file.exists() else []

    def lines(self) -> list[dict]:
        return complete_lines(self.out / "results.jsonl")

    def edit(self, old: str, new: str) -> None:
        text = self.file.read_text()
        assert old in text
        self.file.write_text(text.replace(old, new))


@pytest.fixture
def made(tmp_path):
    return World(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study of which one run failed; tests read it only."""
    world = World(tmp_path_factory.mktemp("trained"))
    world.run()
    return world


def written(world: World, lines: list[dict]) -> Path:
    file = world.folder / "some.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def findings_of(world: World, lines: list[dict]) -> Findings:
    return Findings(read_study(world.file), read_results(written(world, lines)))


def test_failing_run_stops_no_other_and_unfinished_ones_alone_run_again(made, capsys):
    failures = made.run()
    assert [failure.name for failure in failures] == ["grpo-seed3"]
    assert "CUDA went home" in capsys.readouterr().err
    done = [(line["variant"], line["seed"]) for line in made.lines()]
    assert done == [("grpo", 1), ("grpo", 2), ("care", 1), ("care", 2)]
    assert len(made.calls()) == 5
    (made.out / "runs/repaired").touch()
    (made.out / "runs/care-seed2/summary.json").unlink()
    assert made.run() == []
    calls = made.calls()
    assert len(calls) == 7
    assert calls.count("grpo-seed3") == calls.count("care-seed2") == 2
    assert [line["seed"] for line in made.lines()] == [1, 2, 3, 1, 2]
    assert "trainer.seed=2" not in (made.out / "runs/care-seed2/study.json").read_text()


def test_results_hold_what_tables_and_figures_need(trained):
    first = trained.lines()[2]
    assert (first["variant"], first["seed"]) == ("care", 1)
    assert first["overrides"] == ["trainer.max_steps=120"]
    assert (first["steps"], first["wall_seconds"], first["seconds_per_step"]) == (120, 61.0, 1.5)
    assert first["start"]["L1"]["probe_implied"] == 0.7
    assert first["end"]["L2"]["accuracy"] == pytest.approx(0.8)
    curves = first["curves"]
    assert curves["step"] == list(range(3, 121, 3))
    assert curves["reward/accuracy"][0] == pytest.approx(2 / 120, abs=1e-4)
    assert "care/answer_likelihood" not in curves


def test_finished_run_without_metrics_has_a_result(tmp_path):
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "summary.json").write_text('{"steps": 0, "end": {"L1": {"accuracy": 0.5}}}')
    result = read_result("care", TrainingRun("tiny_cpu", (), 1, tmp_path))
    assert (result.end, result.seconds_per_step) == ({"L1": {"accuracy": 0.5}}, None)
    assert result.curves == {"step": []}
    study = Study(title="", recipe="tiny_cpu", seeds=[1], variants={"care": Variant()})
    findings = Findings(study, [result])
    assert main_sheet(findings).markdown().splitlines()[-1] == "| care | 0.50 | 1 |"
    assert draw_curves(findings, tmp_path, "none") is None


def test_variant_may_train_a_recipe_of_its_own(made):
    made.edit("  care:\n", "  care: {recipe: tiny_cpu_grpo, seeds: [1]}\n")
    assert made.run(only=["care"]) == []
    made_with = json.loads((made.out / "runs/care-seed1/study.json").read_text())
    assert made_with["recipe"] == "tiny_cpu_grpo"
    assert "| care |  | --config-name tiny_cpu_grpo |" in (made.out / "study.md").read_text()
    # Its runs are not taken for those of another recipe.
    made.edit("tiny_cpu_grpo", "tiny_cpu")
    with pytest.raises(InputError, match="variant care has changed"):
        made.run(only=["care"])


def test_changed_variant_is_refused_by_name_and_leaves_everything(made, trained):
    made.out = trained.out
    before, calls = made.lines(), made.calls()
    made.edit("  care:\n", "  care:\n    overrides: [optimizer.lr=1.0e-3]\n")
    with pytest.raises(InputError, match=r"variant care has changed .*optimizer.lr=1.0e-3"):
        made.run()
    assert made.lines() == before
    assert made.calls() == calls


def test_interrupted_study_ends_its_runs_keeps_what_is_done_and_goes_on(made, rank_server):
    (made.out / "runs").mkdir(parents=True)
    (made.out / "runs/wait").touch()
    script = made.folder / "study.py"
    script.write_text(
        # A shell's background job ignores Ctrl-C, and hands that on to what it starts.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path; from nemo_care.commands.study import run_study\n"
        f"run_study('mine', Path({str(made.out)!r}), config_dir={str(made.folder)!r}, jobs=1, "
        f"only=['care'], train_command={made.command!r})\n"
    )
    study = rank_server.start(1, [str(script)])
    file = made.out / "runs/care-seed2/pid"
    until = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    run = int(file.read_text())
    os.kill(study.pids[0], signal.SIGINT)
    assert study.wait() != [0]
    with pytest.raises(ProcessLookupError):
        os.kill(run, 0)
    assert [line["seed"] for line in made.lines()] == [1]
    (made.out / "runs/wait").unlink()
    assert made.run(only=["care"]) == []
    assert made.calls() == ["care-seed1", "care-seed2", "care-seed2"]


def test_foreign_run_is_refused(made):
    folder = made.out / "runs/care-seed1"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").touch()
    with pytest.raises(InputError, match=r"variant care: .*not of this study"):
        made.run()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("title: GRPO", "titel: GRPO", r"unknown key variants.grpo.titel; did you mean title\?"),
        ("recipe:", "recipes:", r"unknown key recipes; did you mean recipe\?"),
        ("about: The", "why: The", "unknown key why; known: left, right, about"),
        ("title: Two ways", "", "title has no value"),
        ("[1, 2]", "[one]", r"seeds\[0\]"),
        ("[1, 2]", "[]", "variants.care has no seeds"),
        ("  care:", "  a/b:", "variants.a/b"),
        ("  care:", "  start:", "variants.start"),
        ("left: care", "left: cure", r"contrasts\[0\].left: no variant is called cure"),
        ("curves: [grpo", "curves: [gpro", r"curves\[0\]: no variant is called gpro"),
        ("[+ablation=grpo]", "[trainer.seed=3]", "trainer.seed=3: study sets"),
        ("seeds: [1, 2]\n", "seeds: [1\n", "mine.yaml:5"),
    ],
)
def test_unusable_study_is_refused_in_one_line(made, old, new, named):
    made.edit(old, new)
    with pytest.raises(InputError, match=named) as refused:
        made.run()
    assert str(made.file) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not made.out.exists()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("+ablation=grpo", "+ablation=grop", "variant grpo: .*ablation=grop"),
        ("max_steps=120", "maxsteps=120", "variant grpo: .*trainer.maxsteps"),
        ("recipe: tiny_cpu", "recipe: tiny_gpu", "variant grpo: there is no recipe tiny_gpu"),
    ],
)
def test_unusable_recipe_is_refused_before_the_first_run(made, old, new, named):
    made.edit(old, new)
    with pytest.raises(InputError, match=named):
        made.run()
    assert not made.out.exists()


def test_unknown_names_are_refused(made):
    with pytest.raises(InputError, match="--only: no variant is called cure; variants: grpo, care"):
        made.run(only=["cure"])
    with pytest.raises(InputError, match=r"no study minr; studies: .*study_miniature"):
        find_study("minr")
    with pytest.raises(InputError, match="--jobs=0"):
        made.run(jobs=0)


@pytest.mark.parametrize(
    "file",
    [
        # Each of their many recipes is composed.
        file if file.stem == "study_families" else pytest.param(file, marks=pytest.mark.slow)
        for file in sorted(find_study("study_miniature").parent.glob("*.yaml"))
    ],
)
def test_studies_that_come_with_the_package_are_usable(file, tmp_path):
    runs = study_runs(read_study(file), tmp_path, None)
    assert len({run.folder for made in runs.values() for run in made}) >= 2
    assert json.dumps([run.arguments() for made in runs.values() for run in made])


def row(text: str, first: str) -> list[str]:
    """The cells of the Markdown table's row that begins so, without the first one."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_table_has_means_of_what_is_done(trained):
    text = (trained.out / "study.md").read_text().split("## Every seed")[0]
    assert "4 of 5 runs are done." in text
    table = text.split("## Two ways")[1]
    heading = row(table, "variant")
    start, grpo, care = (row(table, name) for name in ("start", "GRPO", "care"))
    assert heading[:3] == ["L1 accuracy", "L2 accuracy", "L3 accuracy"]
    assert heading[6:8] == [f"{level} consistency of correct answers" for level in ("L1", "L3")]
    assert heading[8:] == [
        "L1 probe implied",
        "L1 probe true",
        "L1 reasoning words",
        "L1 format",
        "seeds",
    ]
    assert start[:2] == ["0.50 ± 0.00", "0.40 ± 0.00"]
    # The start of seed 3 is not known yet: its one run failed.
    assert start[-1] == "2 of 3"
    assert grpo[3] == "0.45 ± 0.07"
    assert grpo[-1] == "2 of 3"
    assert care[3:6] == ["0.96 ± 0.03", "0.86 ± 0.03", "0.76 ± 0.03"]
    assert care[10] == "11.5 ± 0.7"
    assert care[-1] == "2"


def test_contrasts_are_paired_by_seed(trained):
    out = trained.out
    cells = row((out / "study.md").read_text(), "care − GRPO")
    # 0.98 - 0.50 and 0.94 - 0.40: mean 0.51, deviation 0.06 / sqrt(2).
    assert cells == [
        "The bonus.",
        *["0.00 ± 0.00 (0/2)"] * 3,
        *["+0.51 ± 0.04 (2/2)"] * 3,
        "0.00 ± 0.00 (0/2)",
    ]
    record = json.loads((out / "study.json").read_text())
    consistency = record["contrasts"][0]["differences"][3]
    assert (consistency["level"], consistency["key"]) == ("L1", "consistency_rate")
    assert consistency["mean"] == pytest.approx(0.51)
    assert consistency["std"] == pytest.approx(0.06 / 2**0.5)
    assert (consistency["positive"], consistency["seeds"]) == (2, 2)
    ends = record["variants"]["grpo"]["end"]
    assert ends["L1"]["consistency_rate"]["mean"] == pytest.approx(0.45)


def test_differences_below_zero_have_a_sign_and_unpaired_seeds_are_left_out(made, trained):
    # One seed of care is gone: a mean of one pair, without a deviation.
    made.edit("{left: care, right: grpo,", "{left: grpo, right: care,")
    sheet = contrasts_sheet(findings_of(made, trained.lines()[:3]))
    cells = row(sheet.markdown(), "GRPO − care")
    assert cells[4] == "−0.48 (0/1)"


def test_every_seed_and_the_time_are_listed(trained):
    text = (trained.out / "study.md").read_text()
    seeds, time = text.split("## Every seed")[1].split("## Time")
    assert len([line for line in seeds.splitlines() if line.startswith("| GRPO |")]) == 2
    assert "| GRPO | 2 | 0.90 |" in seeds
    # Medians of 61 s and 62 s, of 1.5 s and 2.5 s.
    assert row(time, "care") == ["120", "1 min 2 s", "2.00 s", "2"]


def test_page_is_whole_and_needs_no_other_file(made, trained, capsys):
    made.edit("title: GRPO", "title: <b>GRPO</b>")
    where = ["--config-path", str(made.folder), "--out", str(made.out)]
    results = str(trained.out / "results.jsonl")
    assert main(["--config-name", "mine", *where, "--results", results]) == 0
    page = (made.out / "study.html").read_text()
    assert "&lt;b&gt;GRPO" in page
    assert "<b>" not in page
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 2
    assert "http" not in page
    assert "4 of 5 runs are done" in page
    assert "planted by the warm start" in page
    printed = capsys.readouterr().out
    assert "study.html" in printed
    assert "±0.07" in printed
    assert max(map(len, printed.splitlines()[:-1])) <= 80  # the last line is the page's path


def test_variant_that_starts_elsewhere_is_named(made, trained):
    lines = trained.lines()
    lines[-1]["start"]["L1"]["accuracy"] = 0.1
    assert 'The row "start" is not the start of: care.' in findings_of(made, lines).notes()


def test_each_recipe_has_a_start_of_its_own_if_they_train_different_models(made, trained):
    made.edit("  care:\n", "  care: {recipe: tiny_cpu_grpo}\n")
    lines = trained.lines()
    for line in lines:
        line["start"]["L1"]["accuracy"] = {"grpo": 0.25, "care": 0.125}[line["variant"]]
    findings = findings_of(made, lines)
    table, seeds = (make(findings).markdown() for make in (main_sheet, seeds_sheet))
    first, second = (row(table, f"start of {name}") for name in ("tiny_cpu", "tiny_cpu_grpo"))
    assert (first[0], first[-1]) == ("0.25 ± 0.00", "2 of 3")
    assert (second[0], second[-1]) == ("0.12 ± 0.00", "2")
    assert row(seeds, "start of tiny_cpu_grpo | 2")[1] == "0.12"
    assert not any("is not the start of" in note for note in findings.notes())
    assert findings.as_json()["start of tiny_cpu_grpo"]


def test_study_without_a_finished_run_publishes_nothing(made, capsys):
    made.command = [sys.executable, "-c", "raise SystemExit(3)"]
    assert len(made.run(only=["care"])) == 2
    assert "no run is complete yet" in capsys.readouterr().err
    assert not (made.out / "study.html").exists()


PAGE = """# By hand

<!-- study:table -->
old
<!-- /study:table -->
Between. <!-- study:table --> is no block within a line.
<!-- study:dots -->
<!-- /study:dots -->
"""


def test_docs_get_fresh_tables_figures_and_results(made, trained):
    docs = made.folder / "docs"
    docs.mkdir()
    page = docs / "tiny.md"
    page.write_text(PAGE)
    assert made.run(results_file=trained.out / "results.jsonl", docs=page) == []
    text = page.read_text()
    assert text.startswith("# By hand\n\n<!-- study:table -->\n\n| variant |")
    assert "old" not in text
    assert "Between. <!-- study:table --> is" in text
    assert "](tiny_dots.png)\n\n<!-- /study:dots -->\n" in text
    # Figures of the same results are the same files.
    for name in ("dots", "curves"):
        drawn = (docs / f"tiny_{name}.png").read_bytes()
        assert drawn == (trained.out / f"study_{name}.png").read_bytes()
    # Again, from the results beside it: nothing changes.
    assert made.run(results_file=docs / "tiny.jsonl", docs=page) == []
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        (
            "study:dots",
            "study:dost",
            r'page.md:7: there is no block "study:dost"; blocks: variants',
        ),
        ("<!-- /study:dots -->\n", "", "page.md:7: the block is not closed"),
        ("<!-- /study:table -->\n", "", "page.md:3: the block is not closed"),
        ("<!-- study:table -->\nold\n", "", 'page.md:3: "/study:table" closes what is not open'),
    ],
)
def test_unusable_docs_are_refused_before_the_first_run(made, old, new, named):
    page = made.folder / "page.md"
    page.write_text(PAGE.replace(old, new))
    before = page.read_text()
    with pytest.raises(InputError, match=named):
        made.run(docs=page)
    assert page.read_text() == before
    assert not made.out.exists()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"variant": "cure"}, "seed 1 of cure is not in the study"),
        ({"seed": 9}, "seed 9 of grpo is not in the study"),
        ({"overrides": ["a=1"]}, "seed 1 of grpo was made with different overrides: a=1"),
        ({"seed": 2}, "seed 2 of grpo occurs twice"),
        ({"mood": "good"}, 'some.jsonl:1: unknown key "mood"'),
        ({"curves": {"step": [1, 2], "x": [0.5]}}, 'some.jsonl:1: its "curves" differ in length'),
    ],
)
def test_results_of_another_study_are_refused(made, trained, change, named):
    first, *lines = trained.lines()
    results = written(made, [first | change, *lines])
    with pytest.raises(InputError, match=named):
        made.run(results_file=results)


def test_command_line_prints_status_and_reason(made, trained, capsys):
    where = ["--config-path", str(made.folder), "--out", str(made.out)]
    assert main(["--config-name", "none", *where]) == 2
    assert "there is no study none" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["--config-name", "mine", *where, "--results", "some.jsonl", "--jobs", "2"])
    assert end.value.code == 2


@pytest.mark.parametrize("name", [file.stem for file in sorted(STUDIES.glob("*.yaml"))])
def test_committed_page_says_what_its_results_say(name):
    file, results = DOCS / f"{name}.md", DOCS / f"{name}.jsonl"
    made = read_study(find_study(name))
    found = read_results(results)
    check_results(made, found, results)
    text = file.read_text(encoding="utf-8")
    assert filled_page(text, file, Findings(made, found)) == text
    for figure in re.findall(rf"\]\(({name}_\w+\.png)\)", text):
        assert (DOCS / figure).is_file()
