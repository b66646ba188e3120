"""Tensors of experts on disk: either orientation, found by shape, and written as it was read."""

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from safetensors.torch import load_file
from small_runs import small_recipe
from tiny_qwen3_vl import EXPERTS, rewritten, write_tiny_qwen3

from nemo_care.errors import InputError
from nemo_care.models.hf_tensors import check_weights
from nemo_care.models.weights import export_hf
from nemo_care.training.build import load_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_qwen3(tmp_path_factory.mktemp("experts") / "checkpoint", EXPERTS)


def loaded(folder, world, ranks):
    return load_model(small_recipe(folder, world), ranks)


def assert_same_weights(ours, wanted):
    parameters = dict(wanted.named_parameters())
    assert all(torch.equal(p, parameters[name]) for name, p in ours.named_parameters())


def test_matrices_stored_with_input_first_are_read_and_written_so(
    checkpoint, world, ranks, tmp_path
):
    old = rewritten(checkpoint, tmp_path / "old", lambda tensor: tensor.transpose(1, 2))
    check_weights(old)
    model = loaded(old, world, ranks)
    assert_same_weights(model, loaded(checkpoint, world, ranks))
    export_hf(model, old, tmp_path / "export")
    ours, wanted = (load_file(f / "model.safetensors") for f in (tmp_path / "export", old))
    assert set(ours) == set(wanted)
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_an_export_is_written_as_its_source_is_stored(checkpoint, world, ranks, tmp_path):
    """Also if the weights come from elsewhere, as those of a run's checkpoint do."""
    old = rewritten(checkpoint, tmp_path / "old", lambda tensor: tensor.transpose(1, 2))
    export_hf(loaded(checkpoint, world, ranks), old, tmp_path / "export")
    ours, wanted = (load_file(f / "model.safetensors") for f in (tmp_path / "export", old))
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_the_router_needs_no_transformer_engine(checkpoint, world, ranks, monkeypatch):
    monkeypatch.delattr(moe_utils, "te_general_gemm")
    loaded(checkpoint, world, ranks)
    assert moe_utils.te_general_gemm is None


def test_a_shape_that_fits_neither_way_is_refused(checkpoint, world, ranks, tmp_path):
    cut = rewritten(checkpoint, tmp_path / "cut", lambda tensor: tensor[:, :-1])
    message = r"gate_up_proj is 8x95x64, but config\.json requires 8x96x64 or 8x64x96"
    with pytest.raises(InputError, match=message):
        loaded(cut, world, ranks)
    with pytest.raises(InputError, match=r"is 8x\d+x\d+, but config\.json requires"):
        check_weights(cut)


def test_the_version_of_transformers_decides_about_square_matrices(world, ranks, tmp_path, capsys):
    square = {**EXPERTS, "moe_intermediate_size": 32}
    new = write_tiny_qwen3(tmp_path / "new", square)
    model = loaded(new, world, ranks)
    said = capsys.readouterr().err
    assert said.count("square: read as [experts, output, input]") == 1
    old = rewritten(
        new, tmp_path / "old", lambda t: t.transpose(1, 2), transformers_version="4.57.0"
    )
    assert_same_weights(loaded(old, world, ranks), model)
    assert "read as [experts, input, output], as transformers 4.57.0" in capsys.readouterr().err
