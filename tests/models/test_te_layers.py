"""Layers of TransformerEngine compute, store and save what Megatron's own layers do.

TransformerEngine itself needs CUDA: a stand-in takes its place (made_transformer_engine.py), under
Megatron's real spec. Where it is installed these tests skip; there a GPU is needed to say anything.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from forked_ranks import RankServer
from layouts import LAYOUTS, gather_weights, generate, record_gradients, share_of
from made_groups import make_groups, make_prompts
from made_transformer_engine import PRODUCTS
from on_ranks import OnRanks
from safetensors.torch import load_file
from small_runs import small_recipe, small_trainer, updated

from nemo_care.checkpoints.store import sharding_metadata
from nemo_care.models.weights import _source, export_hf
from nemo_care.ranks.process_groups import Ranks

pytestmark = pytest.mark.skipif(
    find_spec("transformer_engine") is not None, reason="TransformerEngine is installed"
)
BACKENDS = ("local", "transformer_engine")
LAYERS = 4
LINEAR_PER_LAYER = 4


def made_recipe(job, backend: str):
    # In fp32, which recipes refuse with this backend: kernels on a GPU take bf16 only.
    recipe = small_recipe(job["checkpoint"], job["world"])
    recipe.model.backend = backend
    return recipe


def marks(model) -> dict[str, tuple]:
    """The marks by which Megatron knows that a parameter is cut."""
    names = ("tensor_model_parallel", "partition_dim", "sequence_parallel", "allreduce")
    defaults = (False, -1, False, True)
    return {
        " ".join(_source(model, name).names): tuple(
            getattr(parameter, mark, default) for mark, default in zip(names, defaults, strict=True)
        )
        for name, parameter in model.named_parameters()
    }


def step(trainer, job, ranks: Ranks) -> dict:
    """Sampling, scoring, an update and the moving average."""
    result = {"marks": marks(trainer.policy.model)}
    result["sampled"] = generate(trainer, job["prompts"], 1.0, ranks)
    groups = share_of(job["groups"], ranks)
    trainer.reference.score_answers(groups)
    trainer.credit(groups)
    gradients = record_gradients(trainer.policy)
    result["metrics"] = updated(trainer.policy, groups)
    trainer.reference.track(trainer.policy.model, 1)
    return result | {
        "likelihoods": [group.answer_likelihood for group in groups],
        "gradients": gradients,
        "weights": gather_weights(trainer.policy.model),
        "average": gather_weights(trainer.reference.average.model),
        "distance": trainer.reference.distance(trainer.policy.model),
    }


def in_eight_bits(
    job, ranks: Ranks, folder: Path, *, samples=False, count=None, **keys
) -> dict[str, list]:
    """What each pass of a step of `count` groups multiplies, with a rollout if `samples`."""
    recipe = made_recipe(job, "transformer_engine")
    recipe.model.recompute_granularity = keys.pop("recompute_granularity", "none")
    recipe.model.precision.fp8.enabled = True
    for key, value in keys.items():
        setattr(recipe.model.precision.fp8, key, value)
    trainer = small_trainer(recipe, ranks, folder)
    groups = share_of(job["groups"], ranks)[:count]
    passes = {
        "rollout": lambda: samples and generate(trainer, job["prompts"][:count], 1.0, ranks),
        "scoring": lambda: (trainer.reference.score_answers(groups), trainer.credit(groups)),
        "update": lambda: updated(trainer.policy, groups),
    }
    found = {}
    for name, run in passes.items():
        PRODUCTS.clear()
        run()
        found[name] = list(PRODUCTS)
    state = trainer.policy.model.sharded_state_dict("", metadata=sharding_metadata())
    found["states"] = [key for key in state if key.endswith("_extra_state")]
    return found


def resumed(job, ranks: Ranks, folder: Path, first: str) -> dict[str, dict]:
    """A step with one backend, and one more with either: its weights and average."""
    recipe = made_recipe(job, first)
    recipe.trainer.max_steps = 1
    begun = folder / f"begun-{first}"
    small_trainer(recipe, ranks, begun).fit()
    found = {}
    for backend in BACKENDS:
        run = shutil.copytree(begun, folder / f"{first}-{backend}")
        recipe = made_recipe(job, backend)
        recipe.trainer.max_steps = 2
        trainer = small_trainer(recipe, ranks, Path(run))
        trainer.fit()
        found[backend] = gather_weights(trainer.policy.model) | {
            f"average.{name}": tensor
            for name, tensor in gather_weights(trainer.reference.average.model).items()
        }
    return found


def computed(ranks: Ranks, job: dict) -> dict:
    """What both kinds of layers compute in one layout; one process also tries formats."""
    folder, name = job["folder"], job["name"]
    result: dict = {}
    for backend in BACKENDS:
        trainer = small_trainer(made_recipe(job, backend), ranks, folder / f"{name}-{backend}")
        export_hf(trainer.policy.model, job["checkpoint"], folder / f"{name}-{backend}-export")
        result[backend] = step(trainer, job, ranks)
    result["fp8"] = in_eight_bits(job, ranks, folder / f"{name}-fp8", samples=True)
    if name != "tp1":
        return result
    variants = {
        "ends": {"bf16_first_layers": 1, "bf16_last_layers": 2, "count": 1},
        "everywhere": {"samples": True, "scoring": True, "rollout": True, "count": 1},
        "delayed": {"recipe": "delayed", "count": 1},
        "recomputed": {"recompute_granularity": "full"},
        "mxfp8": {"recipe": "mxfp8", "count": 1},
    }
    for variant, keys in variants.items():
        result[f"fp8_{variant}"] = in_eight_bits(job, ranks, folder / f"fp8-{variant}", **keys)
    result["resumed"] = {first: resumed(job, ranks, folder, first) for first in BACKENDS}
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("te")


@pytest.fixture(scope="module")
def results(folder, checkpoint, world):
    """By layout what was computed there: each once, by ranks with the stand-in."""
    server = RankServer(folder, "made_transformer_engine")
    on_ranks = OnRanks(server, folder)
    prompts = make_prompts(checkpoint, world, folder)
    job = {
        "folder": folder,
        "checkpoint": checkpoint,
        "world": world,
        "prompts": prompts,
        "groups": make_groups(prompts, checkpoint),
    }
    made: dict[str, dict] = {}

    def get(name: str) -> dict:
        if name not in made:
            layout, _ = LAYOUTS[name]
            made[name] = on_ranks(layout, computed, job | {"name": name})[0]
        return made[name]

    yield get
    server.close()


@pytest.fixture(
    scope="module",
    params=["tp1", pytest.param("tp2", marks=pytest.mark.slow), "tp2_sequence_parallel"],
)
def both(request, results):
    return request.param, results(request.param)


@pytest.fixture(scope="module")
def one(results):
    return results("tp1")


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
    assert_equal(one["resumed"][first][then], one["resumed"][first][first], 1e-5)


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
