"""The declarations of the metrics: written once, complete, and what records and pages come from."""

import ast
import json
import pickle
import re
from collections import Counter
from pathlib import Path

import pytest
from small_runs import one_step, small_recipe, small_trainer
from sources import parsed

import nemo_care
from nemo_care.recipe.docs import blocks
from nemo_care.runs import metrics as m
from nemo_care.runs.metric import Metric, Over, Panel, Pattern, Reduction
from nemo_care.runs.metrics_page import page

PACKAGE = Path(nemo_care.__file__).parent
DOCS = PACKAGE.parent / "docs"
NAMES = re.compile("|".join(rf"(?<![\w/.]){re.escape(name)}(?![\w/])" for name in m.DECLARED))
BEGINS = re.compile(rf"({'|'.join(m.SECTIONS)})/")


def literals(file: Path) -> list[str]:
    """All string literals of a source, also parts of f-strings; docstrings are none."""
    tree = parsed(file)
    texts = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts
    ]


def test_each_metric_is_named_once_in_the_package():
    found = Counter()
    for file in PACKAGE.rglob("*.py"):
        for text in literals(file):
            names = NAMES.findall(text)
            literal = names or BEGINS.match(text)
            assert not literal or file.name == "metrics.py", f"{file}: use the declaration: {text}"
            found.update(names)
    assert found == Counter(m.DECLARED.keys())


def test_the_committed_page_is_the_generated_one():
    assert (DOCS / "metrics.md").read_text() == page(), "run make docs"


def test_every_metric_is_on_the_page_with_its_meaning():
    text = page()
    assert [name for name, metric in m.DECLARED.items() if f"| `{name}` |" not in text] == []
    assert [name for name, metric in m.DECLARED.items() if not metric.meaning] == []


def test_declarations_name_keys_of_the_recipe():
    known = {block.name for block in blocks()} | {key.name for b in blocks() for key in b.keys}
    for metric in m.DECLARED.values():
        for text in (metric.meaning, metric.good, metric.over):
            for key in re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)(?:=\w+)?`", text):
                assert key in known, f"{metric}: {key} is no recipe key"


def test_documentation_names_metrics_that_exist():
    root = PACKAGE.parent
    files = [*root.glob("*.md"), *DOCS.glob("*.md"), *PACKAGE.rglob("*.py")]
    pattern = re.compile(rf"`((?:{'|'.join(m.SECTIONS)})/[A-Za-z_]+)`")
    named = {(file.name, name) for file in files for name in pattern.findall(file.read_text())}
    assert len(named) > len(m.DECLARED)
    assert [(file, name) for file, name in named if m.declaration(name) is None] == []


@pytest.mark.parametrize(
    ("reduction", "values", "expected"),
    [
        (Reduction.MEAN, [1.0, None, 2.0], 1.5),
        (Reduction.MEAN, [True, False], 0.5),
        (Reduction.SUM, [True, None, True], 2),
        (Reduction.MAX, [1, 3, None], 3),
        (Reduction.MEAN, [None], None),
        (Reduction.SUM, [None], None),
        (Reduction.MAX, [], None),
    ],
)
def test_a_metric_reduces_the_values_that_are_known(reduction, values, expected):
    metric = Metric("train/made", reduction, Over.COMPLETIONS, "made")
    reduced = metric.reduce(values)
    assert (reduced, type(reduced)) == (expected, type(expected))


def test_a_value_that_all_ranks_share_is_not_reduced():
    with pytest.raises(ValueError, match="train/lr has one value"):
        m.LEARNING_RATE.reduce([0.1])


def test_a_metric_is_a_plain_name_wherever_it_goes():
    assert json.loads(json.dumps({m.LOSS: 1.0})) == {"train/loss": 1.0}
    sent = pickle.loads(pickle.dumps(m.LOSS))
    assert (sent, type(sent)) == ("train/loss", str)


def test_open_names_match_what_a_run_chose():
    made = Pattern("made/LEVEL/NAME", Reduction.MEAN, Over.LEVEL, "made")
    name = made.of("L1/a", "accuracy")
    assert (name, name.label, name.meaning) == ("made/L1/a/accuracy", "accuracy", "made")
    assert made.match("made/L1/a/accuracy") == name
    assert made.match("made/L1") is None
    assert made.match("other/L1/accuracy") is None
    assert m.declaration("reward/short_reasoning").label == "short_reasoning"
    assert m.declaration("reward/total") is m.TOTAL_REWARD
    assert m.declaration("rewards/total") is None


def test_a_name_is_declared_once():
    with pytest.raises(ValueError, match="train/loss is declared twice"):
        m.declare(Metric("train/loss", Reduction.MEAN, Over.TOKENS, "another one"))


def test_what_is_not_declared_is_not_recorded_and_what_is_declared_is_also_drawn(
    checkpoint, world, ranks, tmp_path, monkeypatch
):
    trainer = small_trainer(small_recipe(checkpoint, world), ranks, tmp_path)
    panel = Panel(m.SHEETS[0], "Made", "made")
    made = Metric("train/made", Reduction.NONE, Over.STEP, "made", panel=panel)
    step = one_step(trainer)
    step.metrics[made] = 7.0
    with pytest.raises(KeyError, match="train/made is not declared in nemo_care"):
        trainer.record(step)
    assert not (tmp_path / "metrics.jsonl").exists()
    monkeypatch.setitem(m.DECLARED, made, made)
    trainer.record(step)
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert record["train/made"] == 7.0
    assert m.panels_of(m.SHEETS[0], record)[panel] == [made]
    # And what a run records is what is declared, but for what only some recipes have.
    assert [name for name in record if name != "step" and m.declaration(name) is None] == []
    optional = ("rollout/importance", "rollout/staleness", "rollout/rounds", "rollout/groups_s")
    optional += ("rollout/engine_restarts", "moe/")
    patterns = {m.OWN_REWARD, m.VALIDATION, m.ROLLOUT_DIFFERENCE_BY_STALENESS}
    missing = m.DECLARED.keys() - record.keys() - patterns
    assert [name for name in missing if not name.startswith(optional)] == []
