"""Files of a run that are broken when a command reads them: one line with file, line and remedy."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from bad_numbers import inject_at
from made_runs import make_run
from safetensors.torch import load_file, save_file
from small_runs import small_recipe, small_trainer

from nemo_care.cli import main
from nemo_care.commands.train import _changes, _check_folder
from nemo_care.errors import InputError
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.compose import read_recipe
from nemo_care.recipe.schema import recipe_yaml
from nemo_care.runs.files import RunFiles
from nemo_care.training.model_source import find_checkpoint

STRAY = ("step_abc.jsonl", "step_000001.jsonl~", "step_.jsonl", "step_1e3.jsonl", "notes.jsonl")


@pytest.fixture
def refused(capfd):
    """Runs a command line that has to end with status 2 and one line; gives the line."""

    def refused(*arguments) -> str:
        status = main([*map(str, arguments)])
        shown = capfd.readouterr()
        said = [line for line in shown.err.splitlines() if line.startswith("nemo-care: ")]
        assert (status, len(said)) == (2, 1), shown.err
        assert "Traceback" not in shown.err
        return said[0].removeprefix("nemo-care: ")

    return refused


# ---------------------------------------------------------------------- report, compare, study


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", b'{"step": 1}\n{"step": "2"}\n', ':2: "step" is not a whole number'),
        ("validation.jsonl", b'{"step": 0, "levels": ["L1"]}\n', ':1: "levels" is not an object'),
        ("validation.jsonl", b'{"step": 0, "levels": {"L1": 1}}\n', ':1: "levels" is not an'),
        ("skipped.jsonl", b'{"index": 1}\n\n{"index": 2,\n', ":3: not valid JSON"),
        ("rollouts/step_000001.jsonl", b'{"prompt_index": [1]}\n', ':1: "prompt_index" is not'),
        ("rollouts/step_000012.jsonl", b'{"completion": "\xff"}\n', ":1: not valid JSON"),
        ("summary.json", b'{\n  "steps": 12,\n  "wall', ":3: not valid JSON"),
        ("summary.json", b'{"start": ["L1"]}', ': "start" is not an object'),
        ("recipe.yaml", b"model: {hf_path: tiny\ntrainer: 1\n", ":2: not valid YAML"),
        ("recipe.yaml", b"model: {}\nname: \xff\n", ":2: not UTF-8"),
        ("recipe.yaml", b"- a\n- b\n", ": not a recipe"),
        ("recipe.yaml", b"model: \x00\n", ": not a recipe"),
    ],
)
def test_report_names_what_is_broken(tmp_path, refused, name, content, said):
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    line = refused("report", folder)
    assert line.startswith(f"{folder / name}{said}"), line
    assert re.search(r"; (correct|restore|remove)", line), line
    assert not (folder / "report.html").exists()


def test_report_takes_no_stray_file_for_rollouts(tmp_path, capfd):
    folder = make_run(tmp_path / "run")
    for name in STRAY:
        (folder / "rollouts" / name).write_text("not ours\n")
    assert main(["report", str(folder)]) == 0, capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("overrides.json", b'{"overrides": [', ":1: not valid JSON"),
        ("overrides.json", b"[]", ": not a JSON object"),
        ("tiny_cpu-seed1/summary.json", b'{"steps": "2"}', ': "steps" is not a whole number'),
    ],
)
def test_compare_names_what_is_broken_before_it_trains(tmp_path, refused, name, content, said):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    line = refused(
        *("compare", "--recipes", "tiny_cpu", "--seeds", 1, "--out", tmp_path),
        *("--set", "trainer.max_steps=2"),
    )
    assert line.startswith(f"{tmp_path / name}{said}"), line
    assert not (tmp_path / "logs").exists()


STUDY = "title: One\nrecipe: tiny_cpu\nseeds: [1]\nvariants: {care: }\n"
RESULT = {
    **{"variant": "care", "seed": 1, "overrides": [], "steps": 2, "wall_seconds": 1.0},
    **{"seconds_per_step": 0.5, "start": None, "end": {"L1": {}}, "curves": {"step": []}},
    "data": "miniature",
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": "1"}, '"seed" is not a whole number'),
        ({"end": {"L1": 0.5}}, '"end" is not an object in which each value is an object or null'),
        ({"curves": {"step": 3}}, '"curves" is not an object in which each value is a list'),
        ({"curves": {"reward/accuracy": []}}, 'its "curves" lack "step"'),
        ({"overrides": "a=b"}, '"overrides" is not a list in which each value is a text'),
        ({"sead": 1}, 'unknown key "sead"'),
    ],
)
def test_study_names_a_broken_result(tmp_path, refused, change, said):
    (tmp_path / "mine.yaml").write_text(STUDY)
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(RESULT) + "\n\n" + json.dumps(RESULT | change) + "\n")
    given = ("--config-path", tmp_path, "--config-name", "mine", "--out", tmp_path / "out")
    line = refused("study", *given, "--results", file)
    assert line.startswith(f"{file}:3: {said}"), line


def test_study_names_a_torn_note_beside_a_run_before_it_trains(tmp_path, refused):
    (tmp_path / "mine.yaml").write_text(STUDY)
    file = tmp_path / "out/runs/care-seed1/study.json"
    file.parent.mkdir(parents=True)
    given = ("--config-path", tmp_path, "--config-name", "mine", "--out", tmp_path / "out")
    for content in (b'{\n "recipe": "ti', b'{"recipe": "tiny_cpu", "overrides": 3, "seed": 1}'):
        file.write_bytes(content)
        line = refused("study", *given)
        assert line.startswith(f"{file}:"), line
        assert f"remove {file.parent}" in line


# ---------------------------------------------------------------------- a real run


@pytest.fixture(scope="module")
def whole(checkpoint, world, ranks, tmp_path_factory):
    """A run of 3 steps, of which the second was left out, with checkpoints of the others."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 3
    recipe.checkpoint.save_interval = 1
    recipe.exp_manager.explicit_log_dir = str(folder)
    trainer = small_trainer(recipe, ranks, folder)
    inject_at(trainer, {2: "loss"})
    trainer.fit()
    trainer.files.write_recipe(recipe_yaml(recipe))
    return folder


@pytest.fixture
def run(whole, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


BROKEN_RECIPES = {
    "torn within a line": lambda text: text[: len(text) // 2],
    "cut short": lambda text: text[: text.index("\nrollout:") + 1],
    "empty": lambda text: "",
    "unknown key": lambda text: text.replace("group_size:", "group_sise:"),
    "wrong type": lambda text: re.sub("group_size: .*", "group_size: many", text),
    "not text": lambda text: text + "name: \udcff\n",
}


@pytest.mark.parametrize("broken", BROKEN_RECIPES.values(), ids=BROKEN_RECIPES.keys())
def test_a_broken_recipe_is_named_and_the_one_of_a_checkpoint_named_as_remedy(run, broken):
    file = run / "recipe.yaml"
    text = broken(file.read_text())
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=f"^{re.escape(str(file))}") as caught:
        read_recipe(file)
    assert "\n" not in str(caught.value)


def test_a_broken_recipe_of_a_run_does_not_keep_it_from_going_on(run):
    """What a start changes is measured against the checkpoint's recipe, not the directory's."""
    recipe = read_recipe(run / "recipe.yaml")
    recipe.trainer.max_steps = 9
    (run / "recipe.yaml").write_text("trainer: {")
    _check_folder(recipe, run)
    assert _changes(find_checkpoint(run), recipe) == {"trainer.max_steps": [3, 9]}


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_text("trainer: {")])
def test_a_damaged_recipe_of_a_checkpoint_is_left_to_the_resume(run, damage):
    """Which verifies the whole checkpoint, sets it aside and takes the one before it."""
    recipe = read_recipe(run / "recipe.yaml")
    recipe.trainer.max_steps = 9
    damage(find_checkpoint(run) / "recipe.yaml")
    _check_folder(recipe, run)


def test_a_run_is_exported_with_the_recipe_of_its_checkpoint(
    run, ranks, monkeypatch, tmp_path, capfd
):
    class SharedRanks(Ranks):
        def __new__(cls, *arguments, **settings):
            return ranks

    monkeypatch.setattr("nemo_care.ranks.process_groups.Ranks", SharedRanks)
    monkeypatch.setattr(ranks, "close", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    assert main(["export", str(run), str(tmp_path / "first")]) == 0
    (run / "recipe.yaml").write_text("trainer: {")
    capfd.readouterr()
    before = os.umask(0o027)
    try:
        assert main(["export", str(run), str(tmp_path / "second")]) == 0
    finally:
        os.umask(before)
    err = capfd.readouterr().err
    assert f"{run / 'recipe.yaml'}:1: not valid YAML" in err
    assert "checkpoints/step_000003 instead" in err
    first, second = (tmp_path / name / "model.safetensors" for name in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()
    # Others may read what was exported, as far as the umask lets them.
    assert {f.stat().st_mode & 0o777 for f in second.parent.iterdir()} == {0o640}
    assert second.parent.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", '{"step": 1}\n{"step": 2,\n{"step": 3}\n'),
        ("validation.jsonl", '{"step": 0, "levels": {}}\n{"step": 2, "levels": []}\n'),
        ("skipped.jsonl", '{"step": 1, "index": 3, "sample_id": "a", "reason": "b"}\n{}\n'),
    ],
)
def test_a_resume_names_a_broken_record_and_drops_none(run, ranks, name, content):
    (run / name).write_text(content)
    before = {file: file.read_bytes() for file in run.glob("*.jsonl")}
    shutil.rmtree(run / "checkpoints/step_000003")
    recipe = read_recipe(run / "recipe.yaml")
    with pytest.raises(InputError, match=rf"{re.escape(str(run / name))}:2: .*remove the line"):
        small_trainer(recipe, ranks, run).resume()
    assert {file: file.read_bytes() for file in run.glob("*.jsonl")} == before


def test_stray_files_neither_end_a_resume_nor_go(run):
    for name in STRAY:
        (run / "rollouts" / name).write_text("not ours\n")
    RunFiles(run).rewind(1)
    left = {file.name for file in (run / "rollouts").iterdir()}
    assert left == {"step_000001.jsonl", *STRAY}


# ---------------------------------------------------------------------- replay


def _edit(**changes):
    def edit(content: bytes) -> bytes:
        return json.dumps(json.loads(content) | changes).encode()

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda content: content[:500], ":[0-9]+: not valid JSON"),
        (_edit(groups="none"), ': "groups" is not a list in which each value is an object'),
        (_edit(groups=[{"prompt_index": 0}]), ': group 0: "sample_id" is missing'),
        (_edit(update="1"), ': "update" is not a whole number'),
        (_edit(not_finite=[{"what": 1}]), ': not_finite: "what" is not a text'),
        (lambda content: b"[]", ": not a JSON object"),
    ],
)
def test_replay_names_a_broken_description(run, refused, edit, said):
    file = run / "bad_steps/step_000002.json"
    file.write_bytes(edit(file.read_bytes()))
    line = refused("replay", run, "--step", 2)
    assert re.match(f"{re.escape(str(file))}{said}", line), line
    assert "can't be replayed" in line


def test_replay_names_broken_tensors(run, refused):
    file = run / "bad_steps/step_000002.safetensors"
    tensors = load_file(file)
    del tensors["groups.1.completions.2.log_probs"]
    save_file(tensors, file)
    line = refused("replay", run, "--step", 2)
    assert line.startswith(f"{file}: groups.1.completions.2.log_probs is missing"), line
    file.write_bytes(file.read_bytes()[:1000])
    line = refused("replay", run, "--step", 2)
    assert line.startswith(f"{file}: not a readable safetensors file"), line


def test_replay_lists_the_steps_beside_stray_files(run, refused):
    for name in ("step_abc.json", "notes.json", "step_000002.json~"):
        (run / "bad_steps" / name).write_text("not ours")
    assert "steps left out in this run: 2" in refused("replay", run, "--step", 1)


def test_replay_pads_as_training_does(run, monkeypatch):
    """8-bit products of blocks, scattered over 8 ranks, need multiples of 8 x 128 tokens."""
    from nemo_care.commands import replay
    from nemo_care.ranks.process_groups import Layout

    recipe = read_recipe(run / "recipe.yaml")
    fp8 = recipe.model.precision.fp8
    fp8.enabled, fp8.recipe = True, "blockwise"

    class SeenError(Exception):
        pass

    class Eight:
        layout = Layout(tensor=8, sequence_parallel=True)
        data_size, data_rank, rank = 1, 0, 0
        from_rank_zero = from_leader = staticmethod(lambda make, **_: make())

    def policy(model, recipe, ranks, layout):
        raise SeenError(layout)

    monkeypatch.setattr("nemo_care.training.policy.Policy", policy)
    monkeypatch.setattr("nemo_care.training.build.build_model", lambda *_: Model())
    monkeypatch.setattr("nemo_care.training.model_source.ModelSource.load", lambda *_: None)
    with pytest.raises(SeenError) as seen:
        replay._replay(recipe, Eight(), run, 2)
    (layout,) = seen.value.args
    assert layout.multiple == 8 * 128
    assert layout.groups_per_batch == 1


class Model(torch.nn.Module):
    """Stands for the model, of which the padding needs the configuration alone."""

    def __init__(self):
        super().__init__()
        from nemo_care.miniature import CHECKPOINT
        from nemo_care.models.families import read_family

        self.family = read_family(CHECKPOINT)
