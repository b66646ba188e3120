"""`nemo-care export` where the checkpoint that a run started from has moved."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import hf_model
from made_folders import WEIGHTS, change_json, copied
from safetensors.torch import load_file
from small_runs import small_recipe, small_trainer
from test_cli import assert_refused

from nemo_care.cli import main
from nemo_care.recipe.schema import recipe_yaml


@pytest.fixture(scope="module")
def moved(checkpoint, world, ranks, tmp_path_factory) -> tuple[Path, Path]:
    """A run with a checkpoint, and where the folder that it started from is now."""
    folder = tmp_path_factory.mktemp("moved")
    start = copied(checkpoint, folder / "start")
    recipe = small_recipe(start, world)
    trainer = small_trainer(recipe, ranks, folder / "run")
    trainer.step = 1
    trainer.save()
    trainer.checkpoints.wait()
    trainer.files.write_recipe(recipe_yaml(recipe))
    start.rename(folder / "base")
    return folder / "run", folder / "base"


@pytest.fixture
def export(moved, tmp_path, capfd, monkeypatch):
    """Export in this process, which ends before ranks are made if it is refused."""
    # The command hides the GPUs from its process, which here is the tests'.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def export(*arguments: str | Path) -> tuple[int, str]:
        status = main(["export", *map(str, (moved[0], tmp_path / "out", *arguments))])
        assert not (tmp_path / "out").exists()
        return status, capfd.readouterr().err

    return export


def test_a_base_that_has_moved_is_named_with_the_remedy(moved, export):
    assert_refused(export(), str(moved[1].with_name("start")), "--base DIR")


def test_the_moved_base_gives_configuration_and_tokenizer(moved, tmp_path):
    run, base = moved
    # Weights are no part of what is taken from it.
    light = copied(base, tmp_path / "light")
    (light / WEIGHTS).unlink()
    out = tmp_path / "out"
    command = ["export", str(run), str(out), "--base", str(light)]
    subprocess.run([sys.executable, "-m", "nemo_care.cli", *command], check=True, timeout=120)
    ours, original = load_file(out / WEIGHTS), load_file(base / WEIGHTS)
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[name], original[name]) for name in original)
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert hf_model(out).config.text_config.vocab_size == 51


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"text_config__rms_norm_eps": 1e-5}, "text_config.rms_norm_eps is 1e-06"),
        # The same shapes of every tensor, cut into other heads.
        (
            {
                "text_config__num_attention_heads": 4,
                "text_config__num_key_value_heads": 4,
                "text_config__rope_parameters__mrope_section": [2, 3, 3],
            },
            "text_config.num_attention_heads is 2",
        ),
        ({"text_config__vocab_size": 64}, "text_config.vocab_size is 51"),
        ({"vision_config__tokens_per_second": 4}, "vision_config.tokens_per_second is 2"),
    ],
)
def test_a_base_of_another_architecture_is_refused(moved, export, tmp_path, changes, part):
    other = copied(moved[1], tmp_path / "other")
    change_json(other / "config.json", **changes)
    assert_refused(export("--base", other), "not the architecture of --base", part)


def test_a_base_that_is_none_is_refused_under_its_name(moved, export, tmp_path):
    assert_refused(export("--base", tmp_path / "no"), f"--base={tmp_path / 'no'}", "config.json")
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(moved[1] / "config.json", bare)
    assert_refused(export("--base", bare), f"--base={bare}", "no usable tokenizer")
