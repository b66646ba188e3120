"""Plans of models with experts: parameters, memory and work by their distribution."""

import json

import pytest
from made_shapes import LENGTHS, plan_recipe
from tiny_qwen3_vl import EXPERTS, tiny_qwen3_config
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLMoeForConditionalGeneration

from nemo_care.planning.dry_run import dry_run
from nemo_care.planning.flops import head_flops, layer_flops, packed_tokens
from nemo_care.planning.gpus import read_gpu
from nemo_care.planning.plan import Question, make_plan
from nemo_care.planning.search import _layouts, search
from nemo_care.planning.shapes import Lengths, read_model_shape
from nemo_care.planning.stage import built_stage
from nemo_care.planning.work import Clock, Efficiency
from nemo_care.ranks.process_groups import Layout

LAYERS = 2
# TP, PP, EP, replicas.
LAYOUTS = {
    "alone": (1, 1, 1, 1),
    "shared by two replicas": (1, 1, 2, 2),
    "shared by the ranks of one": (2, 1, 2, 1),
    "shared by two replicas of two ranks": (2, 1, 4, 2),
    "of two stages": (1, 2, 2, 2),
}


def config_of(experts=EXPERTS["num_experts"]):
    config = tiny_qwen3_config(EXPERTS | {"num_experts": experts, "num_hidden_layers": LAYERS})
    config.vision_config.deepstack_visual_indexes = [1]
    return config


def recipe_of(folder, tensor, pipeline, expert, replicas):
    recipe = plan_recipe(folder, tensor, pipeline)
    recipe.trainer.devices *= replicas
    recipe.model.expert_model_parallel_size = expert
    recipe.data.video.min_pixels = recipe.data.video.max_pixels = 784
    return recipe


def flops(folder):
    """Matrix FLOPs of a forward pass of text, counted by torch and by the plan."""
    recipe, shape = plan_recipe(folder, 1, 1), read_model_shape(folder)
    lengths, size = Lengths(*LENGTHS, 0, ()), recipe.algorithm.group_size
    with built_stage(recipe, shape, 0) as stage, FlopCounterMode(display=False) as counter:
        batch = stage.layout.batches(stage.groups(lengths, 1))[0]
        hidden = stage.model(batch.rows.inputs(stage.model))
        batch.log_probs(stage.model, hidden, batch.mask)
    by_operator = counter.get_flop_counts()["Global"]
    tokens = packed_tokens(lengths, size, shared=True)
    rows = size * (lengths.completion - 1) + 1
    return {
        "torch": sum(n for op, n in by_operator.items() if "attention" not in str(op)),
        "plan": layer_flops(shape.architecture, tokens) + head_flops(shape.architecture, rows),
    }


def planned(folder):
    """Builds by layout, what a dry run's update sends, layouts that are found, and FLOPs."""
    question = Question(read_gpu("h100-80gb", None), prompt_tokens=80)
    found = {}
    for name, sizes in LAYOUTS.items():
        plan = make_plan(recipe_of(folder, *sizes), question, compare=False)
        found[name] = {
            "parameters": sum(stage.build.unique_parameters for stage in plan.stages),
            "gradients": sum(stage.build.gradients for stage in plan.stages),
            "seconds": plan.seconds.total,
            "micro_batches": [stage.use.micro_batch for stage in plan.stages],
        }
        if name == "shared by two replicas":
            (run,) = dry_run(plan)
            found["sent"] = run.calls["update"]
    layouts = search(recipe_of(folder, 1, 1, 1, 2), question, None, 8, lambda line: None)
    found["searched"] = {
        (m.tensor_model_parallel_size, m.expert_model_parallel_size)
        for m in (item.recipe.model for item in layouts)
    }
    return found | {"flops": flops(folder)}


@pytest.fixture(scope="module")
def plans(on_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shape")
    (folder / "config.json").write_text(json.dumps(config_of().to_dict()))
    return on_ranks(None, planned, str(folder))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_expert_is_counted_once(plans, name):
    model = Qwen3VLMoeForConditionalGeneration(config_of())
    padding = (128 - len(model.lm_head.weight)) * 2 * model.config.text_config.hidden_size
    count = sum(parameter.numel() for parameter in model.parameters())
    assert plans[name]["parameters"] == count + padding


def test_a_rank_has_its_share_of_the_experts(plans):
    experts = LAYERS * 8 * 3 * 64 * 48
    saved = plans["alone"]["gradients"] - plans["shared by two replicas"]["gradients"]
    # Buffers are padded.
    assert saved == pytest.approx(4 * experts / 2, rel=0.01)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_micro_batch_keeps_at_least_the_hidden_states_of_its_layers(plans, name):
    tensor, pipeline, _, _ = LAYOUTS[name]
    tokens = LENGTHS[0] + 4 * LENGTHS[1]
    least = 4 * tokens * 64 * LAYERS // pipeline // tensor
    assert all(kept > least for kept in plans[name]["micro_batches"])


def test_tokens_travel_in_every_layer(plans):
    # Tokens and weights, to the experts and the tokens back, forward and backward.
    assert plans["sent"]["all-to-all"] >= LAYERS * 3 * 2
    assert plans["shared by two replicas"]["seconds"] > 0


def test_search_distributes_experts_too(plans):
    assert {(1, 1), (1, 2), (2, 1), (2, 2)} == plans["searched"]


@pytest.mark.parametrize(
    ("experts", "wanted"),
    [
        (8, {(1, 2), (2, 1), (4, 1)}),
        # With two experts on four ranks, two ranks have half of each expert's matrices.
        (2, {(1, 2), (2, 1), (2, 2)}),
    ],
)
def test_search_cuts_experts_only_where_there_are_too_few(tmp_path, experts, wanted):
    (tmp_path / "config.json").write_text(json.dumps(config_of(experts).to_dict()))
    recipe, shape = recipe_of(str(tmp_path), 1, 1, 1, 4), read_model_shape(str(tmp_path))
    found = map(Layout.of, _layouts(recipe, shape, 1, 4, read_gpu("h100-80gb", None)))
    of_two = {(it.expert, it.expert_tensor_size) for it in found if it.tensor == 2}
    assert of_two == wanted


def test_experts_that_are_cut_send_more(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config_of().to_dict()))
    shape, gpu = read_model_shape(str(tmp_path)), read_gpu("h100-80gb", None)
    seconds = []
    for expert, expert_tensor in ((4, None), (2, 2)):
        recipe = recipe_of(str(tmp_path), 2, 1, expert, 2)
        recipe.model.expert_tensor_parallel_size = expert_tensor
        clock = Clock(recipe, shape.family, Lengths(*LENGTHS, 0, ()), gpu, Efficiency())
        seconds.append(clock._dispatch(1000))
    assert 0 < seconds[0] < seconds[1]


def test_flops_count_the_active_experts(plans):
    assert plans["flops"]["plan"] == pytest.approx(plans["flops"]["torch"], rel=1e-3)


def test_the_published_sizes_have_their_active_parameters():
    for size, billions in (("30B-A3B", 3.0), ("235B-A22B", 21.5)):
        model = read_model_shape(f"nowhere/Qwen3-VL-{size}-Instruct").architecture
        active = (layer_flops(model, 1) + head_flops(model, 1)) / 2
        assert active == pytest.approx(billions * 1e9, rel=0.05)
