"""Stages of big models on `meta` with TransformerEngine's own Python: names, shapes, marks."""

from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch

from nemo_care.checkpoints.store import sharding_metadata
from nemo_care.models.expert_weights import named_weights
from nemo_care.models.transformer_config import transformer_config
from nemo_care.models.weights import _source
from nemo_care.planning.fake_world import fake_world
from nemo_care.planning.shapes import read_model_shape
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.model import FP8Config

pytestmark = pytest.mark.te

WIDE = Layout(tensor=8, pipeline=4, sequence_parallel=True)
SHARED = Layout(tensor=4, sequence_parallel=True, expert=16)
EXPERTS_CUT = Layout(tensor=4, sequence_parallel=True, expert=8, expert_tensor=2)
STAGES = {
    "3B": ("Qwen2.5-VL-3B", Layout(), 0, 1),
    "72B, first": ("Qwen2.5-VL-72B", WIDE, 0, 32),
    "72B, last": ("Qwen2.5-VL-72B", WIDE, 24, 32),
    "30B-A3B": ("Qwen3-VL-30B-A3B", SHARED, 5, 16),
    "30B-A3B, experts cut": ("Qwen3-VL-30B-A3B", EXPERTS_CUT, 5, 16),
}
RECIPES = {
    "tensorwise": "Float8CurrentScaling",
    "delayed": "DelayedScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
UNMARKED = {
    "tensor_model_parallel": False,
    "partition_dim": -1,
    "sequence_parallel": False,
    "allreduce": True,
}


def family_of(size: str):
    return read_model_shape(f"{size}-Instruct").family


@contextmanager
def as_on_a_gpu():
    """Constructors find a GPU; tensors are on `meta`."""
    with (
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.device_count", lambda: 1),
        patch("torch.cuda._lazy_init", lambda: None),
        patch("torch.version.cuda", "13.0"),
        torch.device("meta"),
    ):
        yield


@dataclass
class Stage:
    """Parameters by Hugging Face's names (shape, cut, marks); sharded tensors of checkpoints."""

    parameters: dict
    sharded: dict


def described(parameter) -> dict:
    assert parameter.dtype == torch.bfloat16
    found = {mark: getattr(parameter, mark, no) for mark, no in UNMARKED.items()}
    if not found["allreduce"]:
        # Megatron looks at the dimension only when it cuts a model anew.
        del found["partition_dim"]
    return found | {"shape": tuple(parameter.shape)}


def built(name: str, backend: str, fp8: FP8Config | None = None) -> Stage:
    size, layout, rank, world = STAGES[name]
    family = family_of(size)
    with fake_world(layout, rank, world):
        with as_on_a_gpu():
            config = transformer_config(family, layout, torch.bfloat16, "none", fp8)
            assert not config.use_cpu_initialization
            model = family.build(config, backend)
        parameters, sharded = {}, defaultdict(set)
        for parameter_name, together in named_weights(model):
            source = _source(model, parameter_name)
            parameters[source.names] = (source.cut, [described(p) for p in together])
            owner = parameter_name.rpartition(".")[0]
            if owner.endswith("layernorm"):
                # TransformerEngine marks norms when it fills them, which it does not on `meta`.
                (marks,) = parameters[source.names][1]
                module = model.get_submodule(owner)
                marks["sequence_parallel"] = getattr(
                    module, "sequence_parallel", marks["sequence_parallel"]
                )
        for entry in model.sharded_state_dict("", metadata=sharding_metadata()).values():
            # The experts of a layer are parts of one tensor.
            sharded[entry.key].add(
                (
                    tuple(getattr(entry, "global_shape", ())),
                    tuple(getattr(entry, "local_shape", ())),
                    tuple(getattr(entry, "global_offset", ())),
                    getattr(entry, "replica_id", None),
                )
            )
    return Stage(parameters, sharded)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_stores_what_the_local_layers_store(name):
    ours, wanted = built(name, "transformer_engine"), built(name, "local")
    assert ours.parameters == wanted.parameters
    assert ours.sharded == wanted.sharded
    assert len(ours.parameters) > 100


@pytest.mark.parametrize("recipe", RECIPES)
def test_megatron_makes_transformer_engines_recipe_and_enters_it(recipe):
    from megatron.core.fp8_utils import get_fp8_context, get_fp8_recipe
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    with fake_world(Layout(), 0, 1):
        fp8 = FP8Config(enabled=True, recipe=recipe)
        config = transformer_config(
            family_of("Qwen2.5-VL-3B"), Layout(), torch.bfloat16, "none", fp8
        )
        made = get_fp8_recipe(config)
        names = [kind.__name__ for kind in type(made).__mro__]
        assert RECIPES[recipe] in names
        # The plugin's GPU is an H100, which does not have this one; `check_gpu` says so before.
        refused = pytest.raises((RuntimeError, AssertionError), match=r"10\.0 or higher")
        with (
            refused if recipe == "mxfp8" else nullcontext(),
            as_on_a_gpu(),
            get_fp8_context(config, 0),
        ):
            assert FP8GlobalStateManager.is_fp8_enabled()
        assert not FP8GlobalStateManager.is_fp8_enabled()


@pytest.mark.parametrize("recipe", RECIPES)
def test_only_delayed_scales_are_part_of_a_checkpoint(recipe):
    sharded = built("3B", "transformer_engine", FP8Config(enabled=True, recipe=recipe)).sharded
    states = [key for key in sharded if key.endswith("_extra_state")]
    assert bool(states) is (recipe == "delayed")
