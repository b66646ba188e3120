"""Nothing is written over that a run did not make, or could not make again."""

import json
import os
import shutil
from pathlib import Path

import pytest
from made_commands import world_overrides
from records import lines
from small_runs import small_recipe, small_trainer

from nemo_care.cli import main
from nemo_care.commands.train import _changes, _check_folder
from nemo_care.errors import AlreadyDone, InputError, RunFailed
from nemo_care.models import weights
from nemo_care.recipe.compose import read_recipe
from nemo_care.recipe.schema import Recipe, recipe_yaml
from nemo_care.reporting.report import write_report
from nemo_care.runs.directory import MARKER, check_run_directory, hold_run_directory
from nemo_care.runs.files import Start
from nemo_care.runs.origin import origin
from nemo_care.runs.reader import read_run
from nemo_care.training.checkpointing import refuse_lost_checkpoints


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def fit(recipe: Recipe, ranks, folder: Path) -> None:
    """Train as the command does, in this process."""
    with hold_run_directory(folder, "train"):
        trainer = small_trainer(recipe, ranks, folder)
        checkpoints = trainer.files.checkpoints
        trainer.files.start = Start(
            origin(),
            recipe_yaml(recipe),
            lambda step: _changes(checkpoints / f"step_{step:06d}", recipe),
        )
        trainer.fit()


@pytest.fixture(scope="module")
def made(checkpoint, world, ranks, tmp_path_factory):
    """A finished run of two steps, with an export."""
    folder = tmp_path_factory.mktemp("made") / "run"
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 2
    recipe.checkpoint.export = True
    recipe.checkpoint.save_interval = 1
    fit(recipe, ranks, folder)
    return folder


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.fixture
def recipe(run):
    return read_recipe(run / "recipe.yaml")


# ---------------------------------------------------------------------- whose folder it is


@pytest.mark.parametrize(
    ("command", "name"),
    [("train", "metrics.jsonl"), ("train", "export/model.safetensors"), ("evaluate", "thesis.tex")],
)
def test_a_folder_of_something_else_is_refused_and_left_as_it_is(
    world, tmp_path, capfd, command, name
):
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True)
    file.write_text('{"step": 1}\n')
    before = contents(tmp_path)
    status = main(
        [
            *(command, "--config-name", "tiny_cpu", "trainer.max_steps=1"),
            f"exp_manager.explicit_log_dir={tmp_path / 'mine'}",
            *world_overrides(world),
        ]
    )
    (message,) = capfd.readouterr().err.splitlines()
    assert status == 2
    assert f"{tmp_path / 'mine'} is not a run directory of nemo-care" in message
    assert name.partition("/")[0] in message
    assert "choose another exp_manager.explicit_log_dir" in message
    assert contents(tmp_path) == before


def test_an_empty_run_directory_is_not_the_working_directory(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for command in ("train", "evaluate"):
        arguments = [command, "--config-name", "tiny_cpu", "exp_manager.explicit_log_dir="]
        assert main(arguments) == 2
        assert "exp_manager.explicit_log_dir" in capfd.readouterr().err
    assert not any(path.name in ("rollouts", MARKER) for path in tmp_path.iterdir())


def test_folders_that_a_run_may_use(tmp_path, run):
    check_run_directory(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    check_run_directory(tmp_path / "empty")
    # What slurm/ and a study write before the first start.
    (tmp_path / "early/slurm/17").mkdir(parents=True)
    (tmp_path / "early/study.json").write_text("{}")
    check_run_directory(tmp_path / "early")
    check_run_directory(run)
    # Runs of versions that had no marker.
    (run / MARKER).unlink()
    (run / "starts.jsonl").rename(run / "elsewhere")
    check_run_directory(run)
    (run / "elsewhere").rename(run / "starts.jsonl")
    shutil.rmtree(run / "checkpoints")
    check_run_directory(run)
    (run / "starts.jsonl").write_text('{"race": "Marathon"}\n')
    with pytest.raises(InputError, match="not a run directory"):
        check_run_directory(run)
    with pytest.raises(InputError, match="is a file"):
        check_run_directory(run / "recipe.yaml")


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match=r"file/run can't be written to: .*Not a directory"),
        hold_run_directory(tmp_path / "file/run", "train"),
    ):
        pass


# ---------------------------------------------------------------------- finished and lost runs


def test_a_finished_run_is_left_as_it_is(run, recipe):
    before = contents(run)
    with pytest.raises(AlreadyDone, match=r"finished with 2 steps: trainer\.max_steps above 2"):
        _check_folder(recipe, run)
    recipe.trainer.max_steps = 1
    with pytest.raises(AlreadyDone):
        _check_folder(recipe, run)
    recipe.trainer.seed = 4
    with pytest.raises(InputError, match=r"with another recipe \(trainer.seed: 3 -> 4\)"):
        _check_folder(recipe, run)
    # More steps are another matter.
    recipe.trainer.max_steps = 3
    _check_folder(recipe, run)
    assert contents(run) == before


def test_a_run_whose_end_was_cut_short_is_ended(run, recipe, ranks):
    (run / "summary.json").unlink()
    before = contents(run)
    _check_folder(recipe, run)
    fit(recipe, ranks, run)
    after = contents(run)
    assert json.loads(after["summary.json"])["steps"] == 2
    for name in ("metrics.jsonl", "recipe.yaml", "export/model.safetensors"):
        assert after[name] == before[name]


@pytest.mark.parametrize(
    ("gone", "finished"), [("checkpoints", True), ("checkpoints", False), ("checkpoints/*", False)]
)
def test_a_run_without_its_checkpoints_is_not_emptied(run, recipe, ranks, gone, finished):
    if not finished:
        (run / "summary.json").unlink()
        shutil.rmtree(run / "export")
    for path in run.glob(gone):
        shutil.rmtree(path)
    before = contents(run)
    with pytest.raises(InputError, match="whose checkpoints are gone"):
        _check_folder(recipe, run)
    with pytest.raises(InputError, match="whose checkpoints are gone"):
        small_trainer(recipe, ranks, run).fit()
    assert contents(run) == before


def test_a_run_that_ended_before_its_first_checkpoint_begins_again(tmp_path, recipe, ranks):
    recipe.trainer.max_steps = 1
    folder = tmp_path / "early"
    with hold_run_directory(folder, "train"):
        (folder / "checkpoints").mkdir()
        (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    refuse_lost_checkpoints(folder)
    fit(recipe, ranks, folder)
    assert [record["step"] for record in lines(folder / "metrics.jsonl")] == [1]


def test_an_export_is_there_until_the_next_one_is_complete(run, recipe, ranks, monkeypatch):
    before = contents(run / "export")
    recipe.trainer.max_steps = 3
    with monkeypatch.context() as patch:

        def killed(*arguments):
            raise KeyboardInterrupt

        patch.setattr(weights, "_copy_companions", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(recipe, ranks, run)
    assert contents(run / "export") == before
    fit(recipe, ranks, run)
    after = contents(run / "export")
    assert set(after) == set(before)
    assert after["model.safetensors"] != before["model.safetensors"]
    assert not list(run.glob("export.*"))


# ---------------------------------------------------------------------- what a start changes


def test_a_change_that_the_checkpoint_has_no_state_for_is_refused(tmp_path, recipe, ranks):
    recipe.model.freeze = ["vision", "merger"]
    recipe.checkpoint.export = False
    fit(recipe, ranks, tmp_path / "frozen")
    recipe.trainer.max_steps = 3
    for parts, shown in (([], r"\[\]"), (["language"], r"\[language\]")):
        recipe.model.freeze = parts
        message = rf"model\.freeze={shown}, but .*/step_000002 was trained with \[vision, merger\]"
        with pytest.raises(InputError, match=message):
            _check_folder(recipe, tmp_path / "frozen")
    # Their order says nothing.
    recipe.model.freeze = ["merger", "vision"]
    _check_folder(recipe, tmp_path / "frozen")


def test_a_changed_recipe_counts_from_the_first_step_made_with_it(run, recipe, ranks, capsys):
    old = (run / "recipe.yaml").read_text()
    recipe.trainer.seed = 4
    fit(recipe, ranks, run)
    # No step was left to make.
    assert (run / "recipe.yaml").read_text() == old
    assert "changes of the recipe have no effect: trainer.seed: 3 -> 4" in capsys.readouterr().out
    assert read_run(run).recipe_changes == []
    recipe.trainer.max_steps = 3
    recipe.trainer.seed = 5
    fit(recipe, ranks, run)
    assert read_recipe(run / "recipe.yaml") == recipe
    said = capsys.readouterr().out
    assert "recipe changed from step 3 on: trainer.max_steps: 2 -> 3; trainer.seed: 3 -> 5" in said
    first, second, third = lines(run / "starts.jsonl")
    assert (first["after_step"], first["first_step"], first["changed"]) == (0, 1, {})
    assert (second["after_step"], "first_step" in second) == (2, False)
    assert (third["after_step"], third["first_step"]) == (2, 3)
    assert third["changed"] == {"trainer.max_steps": [2, 3], "trainer.seed": [3, 5]}
    assert "commit" in third
    page = write_report(run).read_text()
    assert "<dt>seed</dt><dd>3, 5 from step 3 on</dd>" in page
    assert "<td>3</td><td>trainer.seed</td><td>3</td><td>5</td>" in page


def test_a_start_that_is_ended_before_its_first_step_leaves_the_recipe(run, recipe, ranks):
    old, summary = ((run / name).read_text() for name in ("recipe.yaml", "summary.json"))
    recipe.trainer.max_steps = 3
    trainer = small_trainer(recipe, ranks, run)
    trainer.files.start = Start({}, recipe_yaml(recipe), lambda step: {})
    trainer.resume()
    assert (run / "recipe.yaml").read_text() == old
    assert (run / "summary.json").read_text() == summary


def test_changes_of_steps_that_were_made_again_do_not_count(tmp_path):
    def start(after: int, first: int | None, **changed: list) -> dict:
        made = {"first_step": first} if first else {}
        return {"after_step": after, "changed": changed, "missing_steps": [], **made}

    starts = [
        start(0, 1),
        start(2, 3, seed=[1, 2]),
        start(4, None, seed=[2, 9]),
        start(4, 5, seed=[2, 3]),
        # From an older checkpoint, whose steps had seed 1.
        start(2, 3, lr=[0.1, 0.2]),
    ]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(s) + "\n" for s in starts))
    (tmp_path / "metrics.jsonl").write_text("")
    (change,) = read_run(tmp_path).recipe_changes
    assert (change.step, change.key, change.old, change.new) == (3, "lr", 0.1, 0.2)


# ---------------------------------------------------------------------- lost records


def test_records_that_a_crash_has_lost_are_named(run, recipe, ranks, capsys):
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[1])
    recipe.trainer.max_steps = 3
    fit(recipe, ranks, run)
    assert "metrics.jsonl lacks steps before the checkpoint: 1;" in (capsys.readouterr().out)
    assert [start["missing_steps"] for start in lines(run / "starts.jsonl")] == [[], [1]]


def test_records_are_on_the_disk_before_their_checkpoint_has_its_name(
    recipe, ranks, tmp_path, monkeypatch
):
    happened: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def note_fsync(descriptor):
        happened.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def note_rename(path, target):
        happened.append(f"named {Path(target).name}")
        return rename(path, target)

    folder = tmp_path / "synced"
    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "rename", note_rename)
    fit(recipe, ranks, folder)
    for step in (1, 2):
        until = happened[: happened.index(f"named step_{step:06d}")]
        for name in ("metrics.jsonl", "skipped.jsonl", f"rollouts/step_{step:06d}.jsonl"):
            assert str(folder / name) in until
        assert str(folder / "rollouts") in until


def test_a_disk_that_does_not_take_the_records_ends_the_run(recipe, ranks, tmp_path, monkeypatch):
    def broken(file):
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr("nemo_care.runs.files.sync_file", broken)
    with pytest.raises(RunFailed, match=r"the records could not be written.*Input/output error"):
        fit(recipe, ranks, tmp_path / "broken")
    assert not list((tmp_path / "broken/checkpoints").glob("step_??????"))
