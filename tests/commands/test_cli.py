"""The command line: bad input ends with status 2 and one line that names key or file and remedy."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_commands import assert_refused, world_overrides

from nemo_care.cli import main

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def run(capfd, tmp_path):
    """Run a command line in this process; gives its status and what it wrote to stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        status = main([*map(str, arguments)])
        return status, capfd.readouterr().err

    return run


@pytest.fixture
def train(run, tmp_path, world):
    def train(*overrides: str) -> tuple[int, str]:
        return run(
            "train",
            "--config-name",
            "tiny_cpu",
            f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
            *world_overrides(world),
            *overrides,
        )

    return train


def small_overrides(world: Path, run: Path) -> list[str]:
    return [
        "trainer.max_steps=1",
        "algorithm.prompts_per_step=4",
        f"exp_manager.explicit_log_dir={run}",
        *world_overrides(world),
    ]


# tests/recipe/ has what the values alone show.
@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("algorithm.group_sise=4", ["algorithm.group_sise", "did you mean algorithm.group_size"]),
        ("algorithm.group_size=1", ["algorithm.group_size=1", "at least 2"]),
        ("model.hf_path=/no/such/folder", ["model.hf_path=/no/such/folder", "config.json"]),
        ("model.tensor_model_parallel_size=2", ["set trainer.devices=2"]),
        ("trainer.devices=3", ["algorithm.prompts_per_step=16", "3"]),
        ("data.train.annotations=none.jsonl", ["none.jsonl", "data.*.root"]),
        ("data.train.root=null", ["data.train.root", "data.train.sources"]),
        ("data.train.sources=[{root:/no/such}]", ["/no/such/train.jsonl"]),
        ("trainer.num_nodes=2", ["trainer.num_nodes=2", "torchrun"]),
    ],
)
def test_unusable_recipe_is_refused_in_one_line(train, override, parts):
    assert_refused(train(override), *parts)


def test_layout_that_does_not_divide_the_model_is_refused(train):
    heads = train("trainer.devices=4", "model.tensor_model_parallel_size=4")
    assert_refused(heads, "model.tensor_model_parallel_size=4", "2 attention heads", "use 1, 2")
    layers = train("trainer.devices=3", "model.pipeline_model_parallel_size=3")
    assert_refused(layers, "model.pipeline_model_parallel_size=3", "4 layers")


def test_what_users_download_is_named_where_it_is_missing(run, checkpoint, tmp_path):
    name = ["train", "--config-name", "grpo_care_qwen2_5_vl_7b", "rollout=megatron"]
    assert_refused(run(*name), "model.hf_path=models/Qwen2.5-VL-7B-Instruct", "config.json")
    # The layout fits this checkpoint with its two key-value heads.
    here = [f"model.hf_path={checkpoint}", "model.tensor_model_parallel_size=2"]
    result = run(*name, *here, f"data.train.root={tmp_path}")
    assert_refused(result, f"{tmp_path}/annotations/training_6k.jsonl", "data.*.root")


@pytest.mark.parametrize(
    "arguments",
    [
        "--config-name tiny_cpu trainer.seed=7 --cfg job",
        "trainer.seed=7 --config-name tiny_cpu --cfg job trainer.max_steps=3",
        "trainer.seed=7 --cfg=job --config-path OWN --config-name=own +ablation=grpo",
    ],
)
def test_flags_and_overrides_come_in_any_order(capsys, tmp_path, arguments):
    (tmp_path / "own.yaml").write_text("defaults: [tiny_cpu, _self_]")
    status = main(["train", *arguments.replace("OWN", str(tmp_path)).split()])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert "\n  seed: 7\n" in shown.out


def test_tokenizer_of_another_model_is_refused(train, copied_checkpoint):
    file = copied_checkpoint / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    video, pad = "<|video_pad|>", "<|image_pad|>"
    for entry in content["added_tokens"]:
        swapped = {video: pad, pad: video}.get(entry["content"])
        entry["content"] = swapped or entry["content"]
    vocabulary[video], vocabulary[pad] = vocabulary[pad], vocabulary[video]
    file.write_text(json.dumps(content))
    result = train(f"model.hf_path={copied_checkpoint}")
    assert_refused(result, "tokenizer does not belong to the model")


def test_unreadable_videos_end_with_status_2(rank_server, world, tmp_path):
    """In a process of its own: the run only finds out when its ranks have started."""
    root = tmp_path / "broken"
    shutil.copytree(world, root)
    for video in (root / "videos").glob("train*"):
        video.write_bytes(b"no video")
    done = rank_server.run(
        [
            *("-m", "nemo_care", "train", "--config-name", "tiny_cpu"),
            *small_overrides(root, tmp_path / "run"),
            "data.validation.annotations=null",
        ]
    )
    assert_refused((done.returncode, done.stderr), "not readable", "data.max_skipped_fraction")


def test_malformed_annotation_is_named_by_its_line(train, world, tmp_path):
    root = tmp_path / "malformed"
    shutil.copytree(world, root)
    file = root / "train.jsonl"
    content = file.read_text().splitlines()
    content[2] = content[2][:20]
    file.write_text("\n".join(content))
    overrides = [f"data.train.root={root}", "data.max_skipped_fraction=0"]
    assert_refused(train(*overrides), "1 of 48", "max_skipped_fraction=0", "train.jsonl:3", "JSON")


def test_ranks_that_the_recipe_does_not_expect_are_refused(train, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert_refused(train(), "2 ranks were started", "trainer.devices=1")


def test_export_of_something_else_is_refused(run, tmp_path, monkeypatch):
    # The command hides the GPUs from its process, which here is the tests'.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    missing = run("export", tmp_path / "none", tmp_path / "out")
    assert_refused(missing, str(tmp_path / "none"), "no such folder")
    assert_refused(run("export", tmp_path, tmp_path / "out"), "recipe.yaml")


def test_every_command_has_help_and_others_are_refused(run):
    for command in ("train", "evaluate", "plan"):
        assert main([command, "--help"]) == 0
    others = ("data", "doctor", "export", "report", "view", "compare", "study")
    for command in (*others, "replay", "miniature"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
    status, err = run("fly")
    assert status == 2
    assert "unknown command fly" in err


_STARTS = """
import sys
from importlib.util import find_spec

from nemo_care.cli import main
from nemo_care.megatron.imports import import_lightly

assert main(["train", "--config-name", "tiny_cpu", "trainer.max_step=1"]) == 2
heavy = {"megatron", "transformers", "lightning", "nemo"} & set(sys.modules)
assert not heavy, heavy
import torch

compile_now = torch.compile
import_lightly()
import megatron.core
import nemo_care.evaluation.llm_judge
from transformers import Qwen2_5_VLForConditionalGeneration

# openai is for the judges that are made.
needless = {"wandb", "sklearn", "scipy", "openai"} & set(sys.modules)
assert not needless, needless
assert torch.compile is compile_now
assert all(map(find_spec, ("wandb", "sklearn", "scipy")))
from megatron.core.jit import jit_fuser

if not torch.cuda.is_available():
    assert "torch._inductor.compile_fx" not in sys.modules
    assert jit_fuser(lambda x: x + 1).__name__ == "<lambda>"
"""


def test_a_start_imports_nothing_for_a_typing_error_and_nothing_that_a_run_never_uses(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _STARTS], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "did you mean trainer.max_steps" in done.stderr


@pytest.mark.slow
def test_torchrun_starts_the_same_entry(world, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    recipe = ["-m", "nemo_care.train", "--config-name", "tiny_cpu", "trainer.devices=2"]
    layout = ["model.pipeline_model_parallel_size=2"]
    subprocess.run(
        [*command, *recipe, *layout, *small_overrides(world, tmp_path / "run")],
        check=True,
        timeout=300,
        cwd=REPOSITORY,
    )
    assert (tmp_path / "run" / "summary.json").is_file()


_NOTES_WHAT_IS_OPENED = """
import os, sys

def note(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".jsonl") and arguments[1] in ("r", "rb"):
        if "/run/" not in str(arguments[0]):
            with open(os.path.join(os.path.dirname(__file__), "opened"), "a") as notes:
                notes.write(f"{arguments[0]}\\n")

sys.addaudithook(note)
if __name__ == "__main__":
    from nemo_care.cli import main

    paths = [os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    sys.exit(main(sys.argv[1:]))
"""


def test_training_starts_its_ranks_and_ends_with_a_table_and_a_checkpoint(
    rank_server, world, tmp_path
):
    """The command as a person types it, on two ranks, down to the exported checkpoint."""
    # Runs the command, and by its name in each rank, before everything else.
    noting = tmp_path / "sitecustomize.py"
    noting.write_text(_NOTES_WHAT_IS_OPENED)
    done = rank_server.run(
        [
            *(noting, "train", "--config-name", "tiny_cpu", "trainer.devices=2"),
            *small_overrides(world, tmp_path / "run"),
        ]
    )
    assert done.returncode == 0, done.stderr
    # The starter reads the annotations, and its two replicas have them from there.
    opened = (tmp_path / "opened").read_text().splitlines()
    assert sorted(opened) == sorted(map(str, world.resolve().glob("*.jsonl")))
    assert "L1" in done.stdout
    assert str(tmp_path / "run" / "export") in done.stdout
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    assert list((tmp_path / "run" / "logs").glob("events.out.tfevents*"))
    assert main(["report", str(tmp_path / "run")]) == 0
    again = ["export", str(tmp_path / "run"), str(tmp_path / "again")]
    rank_server.run(["-m", "nemo_care", *again]).check_returncode()
    exported = [tmp_path / "run" / "export", tmp_path / "again"]
    first, second = ((folder / "model.safetensors").read_bytes() for folder in exported)
    assert first == second


def test_a_refused_start_leaves_the_run_that_is_there_as_it_is(train, tmp_path):
    (tmp_path / "run/checkpoints/step_000001").mkdir(parents=True)
    recipe = tmp_path / "run/recipe.yaml"
    recipe.write_text("that run's")
    assert_refused(train("trainer.resume=never"), "already holds a run", "trainer.resume=never")
    assert recipe.read_text() == "that run's"
    assert sorted(path.name for path in recipe.parent.iterdir()) == ["checkpoints", "recipe.yaml"]
