"""What a plan says about frozen parts."""

import math
import os

import pytest
from made_shapes import LENGTHS, plan_recipe, write_small_shape

from nemo_care.planning.flops import busiest_vision_flops, step_flops
from nemo_care.planning.gpus import read_gpu
from nemo_care.planning.plan import Question, make_plan
from nemo_care.planning.shapes import longest_lengths, read_model_shape

CASES = [(), ("vision",), ("vision", "merger"), ("language",)]


def planned(folder: str) -> dict:
    """Memory of a rank by the frozen parts, in a world of one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = {}
    for parts in CASES:
        recipe = plan_recipe(folder, 1, 1)
        recipe.model.freeze = list(parts)
        recipe.algorithm.prompts_per_step = 3
        plan = make_plan(recipe, Question(read_gpu("h100-80gb")), compare=False)
        (stage,) = plan.stages
        found[parts] = {
            "build": vars(stage.build),
            "kept": stage.use.kept_vision,
            "vision": stage.use.vision,
            "peaks": stage.peaks,
            "checkpoint": plan.checkpoint_bytes,
        }
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_shape(tmp_path_factory.mktemp("shapes") / "small")


def test_frozen_parts_take_no_memory_but_their_weights(small, on_ranks):
    found = on_ranks(None, planned, str(small))[0]
    family = read_model_shape(str(small)).family
    shapes = family.tensor_shapes()

    def numbers(part: str) -> int:
        return sum(math.prod(shape) for name, shape in shapes.items() if _part(name) == part)

    whole = sum(map(numbers, ("vision", "merger", "language")))
    for parts, of in found.items():
        trained = whole - sum(map(numbers, parts))
        build = of["build"]
        # In float32 throughout; buffers are padded by a little.
        assert build["parameters"] == whole
        assert build["gradients"] == pytest.approx(4 * trained, rel=2e-3)
        assert build["optimizer"] == pytest.approx(8 * trained, rel=2e-3)
        # The twin's buffers are its own.
        assert build["reference_weights"] == pytest.approx(4 * trained, rel=1e-3)
        assert of["checkpoint"] == pytest.approx(4 * (2 * whole + 3 * trained), rel=2e-3)
    lengths = longest_lengths(plan_recipe(str(small), 1, 1), family)
    assert lengths.vision > 0
    vision = family.hf.vision_config
    tokens, merged = lengths.vision, vision.spatial_merge_size**2 * vision.hidden_size
    kept = {parts: of["kept"] for parts, of in found.items()}
    assert kept == {
        (): 0,
        ("language",): 0,
        ("vision",): 4 * tokens * merged,
        ("vision", "merger"): 4 * tokens * vision.out_hidden_size,
    }
    # The tower keeps nothing for backward.
    assert found["vision", "merger"]["vision"] == 0 < found[()]["vision"]
    trained, frozen = (found[parts]["peaks"]["update"] for parts in ((), ("vision", "merger")))
    assert frozen < trained - found[()]["vision"] / 2


def _part(name: str) -> str:
    if not name.startswith("visual."):
        return "language"
    return "merger" if "merger" in name else "vision"


def test_a_frozen_tower_is_counted_once_per_prompt(small):
    family = read_model_shape(str(small)).family
    recipe = plan_recipe(str(small), 1, 1)
    lengths = longest_lengths(recipe, family)
    whole, merger = family.vision_flops(lengths.grids), family.merger_flops(lengths.grids)
    assert 0 < merger < whole / 2
    prompts = recipe.algorithm.prompts_per_step

    def saved(*parts: str) -> dict[str, float]:
        recipe.model.freeze = []
        before = step_flops(recipe, family, lengths)
        recipe.model.freeze = list(parts)
        after = step_flops(recipe, family, lengths)
        return {phase: (before[phase] - after[phase]) / prompts for phase in before}

    assert saved("vision", "merger") == pytest.approx(
        {"rollout": 0, "scoring": whole, "update": 3 * whole}
    )
    assert saved("vision") == pytest.approx(
        {"rollout": 0, "scoring": whole - merger, "update": 3 * (whole - merger)}
    )
    # Engines run their own tower; ours runs first in the scoring pass.
    recipe.rollout.backend = "vllm"
    assert saved("vision", "merger") == pytest.approx(
        {"rollout": 0, "scoring": 0, "update": 3 * whole}
    )
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    assert saved("vision", "merger") == pytest.approx(
        {"rollout": 0, "scoring": 0, "update": 2 * whole}
    )
    recipe.model.freeze = ["vision"]
    assert busiest_vision_flops(recipe, family, lengths, 1, "update") == pytest.approx(whole)
    assert busiest_vision_flops(recipe, family, lengths, 1, "rollout") == pytest.approx(merger)
    assert LENGTHS[0] >= lengths.prompt
