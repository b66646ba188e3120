"""`nemo-care study`: what is run, what is refused, what comes out."""

import json
import sys
from pathlib import Path

import pytest

from nemo_care.errors import InputError
from nemo_care.json_lines import complete_lines
from nemo_care.study.command import run_study
from nemo_care.study.config import find_study, read_study

# A stand-in for training: writes what a run leaves behind. Seed 3 of "grpo" fails.
FAKE = """
import json, pathlib, sys
args = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
folder = pathlib.Path(args["exp_manager.explicit_log_dir"].strip("'"))
folder.mkdir(parents=True, exist_ok=True)
seed, steps = int(args["trainer.seed"]), int(args["trainer.max_steps"])
with (folder.parent / "calls.txt").open("a") as calls:
    calls.write(folder.name + "\\n")
(folder / "recipe.yaml").write_text("data: {train: {kind: miniature}}")
is_grpo = args.get("+ablation") == "grpo"
if is_grpo and seed == 3 and not (folder.parent / "mended").exists():
    sys.exit("CUDA went home")
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


def test_failing_run_stops_no_other_and_is_the_only_one_to_run_again(made, capsys):
    failures = made.run()
    assert [failure.name for failure in failures] == ["grpo-seed3"]
    assert "CUDA went home" in capsys.readouterr().err
    done = [(line["variant"], line["seed"]) for line in made.lines()]
    assert done == [("grpo", 1), ("grpo", 2), ("care", 1), ("care", 2)]
    assert len(made.calls()) == 5
    (made.out / "runs/mended").touch()
    assert made.run() == []
    assert made.calls().count("grpo-seed3") == 2
    assert len(made.calls()) == 6
    assert [line["seed"] for line in made.lines()] == [1, 2, 3, 1, 2]


def test_results_hold_what_tables_and_figures_need(made):
    made.run(only=["care"])
    first = made.lines()[0]
    assert first["overrides"] == ["trainer.max_steps=120"]
    assert (first["steps"], first["wall_seconds"], first["seconds_per_step"]) == (120, 61.0, 1.5)
    assert first["start"]["L1"]["probe_implied"] == 0.7
    assert first["end"]["L2"]["accuracy"] == pytest.approx(0.8)
    curves = first["curves"]
    assert curves["step"] == list(range(3, 121, 3))
    assert curves["reward/accuracy"][0] == pytest.approx(2 / 120, abs=1e-4)
    assert "care/answer_likelihood" not in curves


def test_unfinished_run_is_given_the_same_command_again(made):
    made.run(only=["care"])
    (made.out / "runs/care-seed2/summary.json").unlink()
    made.run(only=["care"])
    assert made.calls() == ["care-seed1", "care-seed2", "care-seed2"]
    assert "trainer.seed=2" not in (made.out / "runs/care-seed2/study.json").read_text()


def test_changed_variant_is_refused_by_name_and_leaves_everything(made):
    made.run(only=["care"])
    before = made.lines()
    made.edit("  care:\n", "  care:\n    overrides: [optimizer.lr=1.0e-3]\n")
    with pytest.raises(InputError, match=r"variant care has changed .*optimizer.lr=1.0e-3"):
        made.run()
    assert made.lines() == before
    assert made.calls() == ["care-seed1", "care-seed2"]


def test_foreign_run_is_refused(made):
    folder = made.out / "runs/care-seed1"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").touch()
    with pytest.raises(InputError, match=r"variant care: .*no run of this study"):
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
    with pytest.raises(InputError, match="no study minr; studies: study_miniature"):
        find_study("minr")
    with pytest.raises(InputError, match="--jobs=0"):
        made.run(jobs=0)


@pytest.mark.parametrize("file", sorted(find_study("study_miniature").parent.glob("*.yaml")))
def test_studies_that_come_with_the_package_are_usable(file, tmp_path):
    from nemo_care.study.runs import study_runs

    runs = study_runs(read_study(file), tmp_path, None)
    assert len({run.folder for made in runs.values() for run in made}) >= 2
    assert json.dumps([run.arguments() for made in runs.values() for run in made])
