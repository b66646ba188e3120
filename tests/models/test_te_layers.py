"""Layers of TransformerEngine compute, store and save what Megatron's own layers do.

TransformerEngine itself needs CUDA: a stand-in takes its place (made_transformer_engine.py), under
Megatron's real spec. Where it is installed these tests skip; there a GPU is needed to say anything.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from made_groups import make_groups, make_prompts
from safetensors.torch import load_file

from nemo_care.ranks.launch import start_ranks

pytestmark = pytest.mark.skipif(
    find_spec("transformer_engine") is not None, reason="TransformerEngine is installed"
)
PROGRAM = Path(__file__).parents[1] / "helpers/te_program.py"
RANKS = {"one": 1, "tp2": 2, "tp2_sequence_parallel": 2}
LAYERS = 4
LINEAR_PER_LAYER = 4


@pytest.fixture(scope="module")
def folder(checkpoint, world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("te")
    prompts = make_prompts(checkpoint, world, folder)
    contents = {
        "checkpoint": checkpoint,
        "world": world,
        "prompts": prompts,
        "groups": make_groups(prompts, checkpoint),
    }
    torch.save(contents, folder / "job.pt")
    return folder


@pytest.fixture(
    scope="module",
    params=["one", pytest.param("tp2", marks=pytest.mark.slow), "tp2_sequence_parallel"],
)
def both(request, folder):
    name = request.param
    file = folder / f"{name}.pt"
    if not file.exists():
        assert start_ranks(RANKS[name], [str(PROGRAM), str(folder), name]) == 0
    return name, torch.load(file, weights_only=False)


@pytest.fixture(scope="module")
def one(folder):
    file = folder / "one.pt"
    if not file.exists():
        assert start_ranks(1, [str(PROGRAM), str(folder), "one"]) == 0
    return torch.load(file, weights_only=False)


def assert_equal(ours: dict, wanted: dict, absolute: float) -> None:
    assert set(ours) == set(wanted)
    for name, tensor in wanted.items():
        difference = (ours[name] - tensor).abs().max().item()
        assert difference <= absolute, f"{name} differs by {difference}"


def test_a_step_equals_that_of_local_layers(both):
    _, result = both
    ours, wanted = result["transformer_engine"], result["local"]
    assert ours["sampled"] == wanted["sampled"]
    for mine, other in zip(ours["likelihoods"], wanted["likelihoods"], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-5, equal_nan=True)
    for name in ("train/loss", "train/grad_norm", "care/logprob_difference"):
        assert ours["metrics"][name] == pytest.approx(wanted["metrics"][name], abs=1e-5), name
    assert_equal(ours["gradients"], wanted["gradients"], 1e-5)
    assert_equal(ours["weights"], wanted["weights"], 1e-5)
    assert_equal(ours["average"], wanted["average"], 1e-5)
    assert ours["distance"] == pytest.approx(wanted["distance"], rel=1e-5)
    assert ours["distance"] > 0


def test_parameters_carry_the_marks_of_local_layers(both):
    name, result = both
    ours, wanted = result["transformer_engine"]["marks"], result["local"]["marks"]
    assert ours == wanted
    norms = [mark for names, mark in ours.items() if "model.layers" in names and "norm" in names]
    assert len(norms) == 2 * LAYERS
    assert all(mark[2] is (name == "tp2_sequence_parallel") for mark in norms)


def test_hugging_face_weights_come_back_bit_by_bit(both, folder, checkpoint):
    name, _ = both
    original = load_file(checkpoint / "model.safetensors")
    exported = load_file(folder / f"{name}-transformer_engine-export" / "model.safetensors")
    assert set(exported) == set(original)
    assert all(torch.equal(exported[key], original[key]) for key in original)


@pytest.mark.parametrize(
    ("first", "then"), [("local", "transformer_engine"), ("transformer_engine", "local")]
)
def test_a_run_goes_on_with_the_other_backend(one, first, then):
    """Weights, optimizer state, average and the optimizer's step."""
    assert_equal(one["resumed"][first, then], one["resumed"][first, first], 1e-5)


def recipes_by_layer(products) -> list[set]:
    """Of each layer in turn, in forward: the recipes of its products."""
    layers = [products[at : at + LINEAR_PER_LAYER] for at in range(0, len(products), 4)]
    found = [set() for _ in range(LAYERS)]
    for number, layer in enumerate(layers):
        found[number % LAYERS] |= {product.recipe for product in layer}
    return found


def test_only_the_update_is_in_eight_bits(both):
    _, result = both
    for name in ("rollout", "scoring"):
        assert {product.recipe for product in result["fp8"][name]} == {None}
    update = result["fp8"]["update"]
    assert recipes_by_layer(update) == [{"Float8CurrentScaling"}] * LAYERS
    # The weights are rounded once a step, at its first micro-batch.
    firsts = [product.first for product in update]
    assert all(firsts[: LAYERS * LINEAR_PER_LAYER])
    assert not any(firsts[LAYERS * LINEAR_PER_LAYER :])
    assert len(firsts) > LAYERS * LINEAR_PER_LAYER


def test_first_and_last_layers_stay_in_bf16(one):
    wanted = [{None}, {"Float8CurrentScaling"}, {None}, {None}]
    assert recipes_by_layer(one["fp8_ends"]["update"]) == wanted


def test_sampling_and_scoring_in_eight_bits_are_padded_to_what_products_take(one):
    for name in ("rollout", "scoring", "update"):
        products = one["fp8_everywhere"][name]
        assert {product.recipe for product in products} == {"Float8CurrentScaling"}
        assert all(product.rows % 16 == 0 for product in products)
        assert all(product.grad is (name == "update") for product in products)


def test_mxfp8_pads_to_32_tokens(one):
    update = one["fp8_mxfp8"]["update"]
    assert {product.recipe for product in update} == {"MXFP8BlockScaling"}
    assert all(product.rows % 32 == 0 for product in update)


def test_recomputed_layers_are_in_eight_bits_again_and_keep_no_copies(one):
    update, plain = one["fp8_recomputed"]["update"], one["fp8"]["update"]
    assert len(update) == 2 * len(plain)
    assert {product.recipe for product in update} == {"Float8CurrentScaling"}
    assert {product.first for product in update} == {None}


def test_only_delayed_scales_are_part_of_a_checkpoint(one):
    assert one["fp8"]["states"] == []
    assert one["fp8_delayed"]["states"]
    assert {product.recipe for product in one["fp8_delayed"]["update"]} == {"TEDelayedScaling"}
