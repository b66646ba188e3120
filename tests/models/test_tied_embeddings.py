"""Small models tie their output layer to their embedding; with stages, two ranks hold it."""

import json
from pathlib import Path

import pytest
import torch
from golden import hf_model
from safetensors.torch import load_file
from tiny_qwen3_vl import write_tiny_qwen3

pytestmark = pytest.mark.numeric

PROGRAM = Path(__file__).parents[1] / "helpers/tied_program.py"


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def tied_checkpoint(request, checkpoint, tmp_path_factory):
    """A tiny checkpoint without lm_head, as a tied model is stored."""
    import shutil

    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tied") / "checkpoint"
    if request.param == "qwen3_vl":
        return write_tiny_qwen3(folder, tie_word_embeddings=True)
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def runs(rank_server, tied_checkpoint, world, tmp_path_factory):
    """Folders of the program's results with one and with two stages."""
    folders = {stages: tmp_path_factory.mktemp(f"stages{stages}") for stages in (1, 2)}
    for stages, folder in folders.items():
        arguments = [str(PROGRAM), str(tied_checkpoint), str(world), str(folder)]
        rank_server.run(stages, arguments)
    return folders


@pytest.mark.parametrize("stages", [1, 2])
def test_tied_model_equals_hugging_face_and_exports_bit_for_bit(runs, stages):
    result = torch.load(runs[stages] / "result.pt")
    assert result["logits_difference"] <= 1e-4
    assert result["export_equal"]


def test_both_copies_of_the_tied_weight_stay_equal(runs):
    assert torch.load(runs[2] / "result.pt")["copies_apart"] == 0
    trained = hf_model(runs[2] / "trained")
    assert trained.lm_head.weight.data_ptr() == trained.get_input_embeddings().weight.data_ptr()


def test_stages_train_a_tied_model_like_one_process(runs):
    norms = [torch.load(folder / "result.pt")["grad_norms"] for folder in runs.values()]
    assert norms[0][0] > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
