"""What `nemo-care plan` says equals what really is allocated, kept and computed."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from fake_worlds import made_plans, variants
from made_shapes import LENGTHS, PACKAGED, plan_recipe, write_small_shape
from torch.autograd.graph import saved_tensors_hooks

from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Group
from nemo_care.megatron.optimizer import initialise_adamw_state
from nemo_care.planning.flops import busiest_vision_flops
from nemo_care.planning.shapes import Lengths, lengths_of, made_group, read_model_shape
from nemo_care.recipe.schema import Recipe
from nemo_care.rollouts.decoding import Decoding
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.megatron import MegatronGenerator
from nemo_care.scoring.reference import Reference
from nemo_care.training.build import build_model
from nemo_care.training.policy import Policy
from nemo_care.training.step import Step

GRANULARITIES = ("none", "selective", "full")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_shape(tmp_path_factory.mktemp("shapes") / "small")


@pytest.fixture(scope="module")
def planned(small, on_ranks):
    """What fake worlds say, from a process of their own."""
    return on_ranks(None, made_plans, str(small))[0]


@pytest.mark.parametrize("name", PACKAGED)
def test_parameters_of_all_stages_sum_to_hugging_faces_count(planned, name):
    wanted, counted = planned["counts"][name]
    assert counted == wanted


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_held_bytes_equal_those_of_a_real_build(planned, small, ranks, dtype):
    recipe = plan_recipe(small, 1, 1)
    recipe.model.precision.dtype = dtype
    layout = BatchLayout.of(ranks.layout, 1, 0, shared_prompt=True)
    reference = Reference(build_model(recipe, ranks), recipe.algorithm, ranks, layout)
    model = build_model(recipe, ranks)
    policy = Policy(model, recipe, ranks, layout)
    initialise_adamw_state(policy.optimizer)
    inner = policy.optimizer.chained_optimizers[0].optimizer
    states = [tensor for state in inner.state.values() for tensor in state.values()]
    masters = [
        parameter
        for group in inner.param_groups
        for parameter in group["params"]
        if dtype == "bf16"  # in fp32 the weights are their own masters
    ]
    twin = reference.average.model
    wanted = {
        "weights": bytes_of(model.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in policy.wrapped.buffers),
        "optimizer": bytes_of([*states, *masters]),
        "reference_weights": bytes_of(twin.parameters()),
        "reference_average": bytes_of(reference.average.state.values()) if masters else 0,
    }
    for name, size in wanted.items():
        # Megatron pads the gradient buffer, and rotary frequencies are no parameters.
        assert planned["builds"][dtype][name] == pytest.approx(size, rel=1e-4), name


def random_model(recipe, ranks):
    model = build_model(recipe, ranks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model


def bytes_of(tensors) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_activations_equal_what_a_real_forward_saves(planned, small, ranks, granularity):
    recipe = plan_recipe(small, 1, 1, granularity)
    model = random_model(recipe, ranks).train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    kept: list[torch.Tensor] = []
    batch = BatchLayout(1, 0, multiple=16).batches([group_with_frames(recipe, model.family)])[0]
    inputs = batch.rows.inputs(model)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(inputs)
    # The pipeline keeps what a stage gives.
    note(out)
    # On a CPU, attention also keeps masks and scores that the flash kernel does not.
    ours = planned["uses"][granularity]["micro_batch"]
    assert ours == pytest.approx(sum(saved.values()), rel=0.1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_peak_of_a_real_update_is_what_the_plan_says(planned, small, ranks, granularity):
    recipe = plan_recipe(small, 1, 1, granularity)
    model = random_model(recipe, ranks)
    layout = BatchLayout.of(ranks.layout, 1, 0, shared_prompt=True)
    policy = Policy(model, recipe, ranks, layout)
    # Its temporary copies differ between CPU and GPU.
    policy.optimizer.step = lambda: (True, 0.0, None)
    group = group_with_frames(recipe, model.family)
    policy.update(Step(0, trained=[group]))
    use = planned["uses"][granularity]
    real = allocated_peak(lambda: policy.update(Step(0, trained=[group])))
    assert use["update"] == pytest.approx(real, rel=0.02)


def allocated_peak(run) -> int:
    """Bytes that torch's CPU allocator gives out at the peak, beyond what it held before."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


def group_with_frames(recipe, family) -> Group:
    """A group of LENGTHS whose prompt has real frames."""
    group = made_group(lengths_of(recipe, family, *LENGTHS), family, 0, recipe.algorithm.group_size)
    frames = [torch.randint(0, 256, f.shape, dtype=torch.uint8) for f in group.prompt.frames]
    group.prompt = replace(group.prompt, frames=tuple(frames))
    return group


def test_recomputation_is_planned_to_keep_less(planned):
    kept = [planned["uses"][name]["micro_batch"] for name in GRANULARITIES]
    assert kept[0] > kept[1] > 5 * kept[2]


def test_cache_bytes_equal_those_of_real_decoding(planned, small, ranks):
    recipe = plan_recipe(small, 1, 1)
    model = random_model(recipe, ranks)
    size = recipe.algorithm.group_size
    prompt = group_with_frames(recipe, model.family).prompt
    tokenizer = ChatTokenizer(base=None, eos_ids=frozenset(), pad_id=0)
    sampling = Sampling(size, 1.0, 1.0, LENGTHS[1], ())
    generator = MegatronGenerator(model, tokenizer, ranks, groups_per_batch=1)
    with generator.inference():
        decoding = Decoding(model, ranks, [prompt], size, sampling, tokenizer)
        decoding.run(torch.rand(size, LENGTHS[1], dtype=torch.float64))
    assert planned["uses"]["none"]["key_value_cache"] == decoding.cache.nbytes
    text = model.family.hf.text_config
    width = text.hidden_size // text.num_attention_heads
    entries = LENGTHS[0] + size * LENGTHS[1]
    per_token = 2 * 4 * text.num_key_value_heads * width * text.num_hidden_layers
    assert decoding.cache.nbytes == entries * per_token


def test_windows_in_one_kernel_call_keep_what_one_call_each_keeps(planned):
    vision = planned["vision"]
    assert vision["together"] == pytest.approx(vision["one_by_one"], rel=1e-3)


def test_peak_with_several_micro_batches_in_flight_is_that_of_the_real_schedule(planned):
    assert len(planned["schedule"]) == 4
    for real, formula in planned["schedule"]:
        assert formula == pytest.approx(real, rel=0.01)
    assert planned["schedule"][3][0] > 2 * planned["schedule"][0][0]


def test_dealt_frames_are_counted_on_the_rank_that_computes_most():
    family = read_model_shape("Qwen2.5-VL-7B-Instruct").family
    recipe = Recipe()
    recipe.model.tensor_model_parallel_size = 4
    for frames, busiest in ((8, 2), (6, 2), (2, 1)):
        lengths = Lengths(2048, 128, 0, ((frames, 20, 28),))
        frame = family.vision_flops(((1, 20, 28),))
        recipe.model.vision.shard = True
        counted = busiest_vision_flops(recipe, family, lengths, 1)
        assert counted == pytest.approx(busiest * frame)
        assert busiest_vision_flops(recipe, family, lengths, 4) == pytest.approx(frames * frame)
        recipe.model.vision.shard = False
        assert busiest_vision_flops(recipe, family, lengths, 1) == pytest.approx(frames * frame)
    assert busiest_vision_flops(recipe, family, Lengths(64, 8, 0, ()), 1) == 0


def test_flops_equal_torchs_count(planned):
    assert planned["flops"]["plan"] == pytest.approx(planned["flops"]["torch"], rel=1e-3)


def test_impossible_layouts_are_refused_with_the_values_that_fit(planned):
    refusals = planned["refusals"]
    assert "tensor_model_parallel_size=3" in refusals["tensor"]
    assert refusals["tensor"].endswith("use 1, 2, 4")
    assert "pipeline_model_parallel_size=5" in refusals["pipeline"]
    assert refusals["pipeline"].endswith("use 1, 2, 4, 7, 14, 28")
    assert "Qwen2.5-VL-72B-Instruct" in refusals["model"]


def test_dry_run_that_does_not_fit_names_a_remedy(planned):
    line = planned["refusals"]["memory"]
    assert line.startswith("stage 0 needs")
    assert "set optimizer.offload=true" in line
    assert "not enough" not in line
    assert "\n" not in line


def test_search_lists_what_the_plan_accepts_and_nothing_else(planned):
    *found, tried = planned["search"]
    assert found
    for overrides, peak, planned_peak, fits in found:
        assert fits, overrides
        assert peak == pytest.approx(planned_peak, abs=2**13), overrides
    refused = [line for line in tried if line.endswith("does not fit")]
    assert refused
    assert len(tried) == len(refused) + len(found)


def test_dry_run_passes_hidden_states_from_stage_to_stage(planned):
    first, second = planned["dry_runs"]["TP 2 PP 2"]
    assert (first["rank"], second["rank"]) == (0, 2)
    for phase in ("rollout", "scoring", "update"):
        sent = first["bytes"][phase]["send to a neighbour"]
        assert sent == second["bytes"][phase]["receive from a neighbour"] > 0
    # Gradients go back in the update only.
    assert second["bytes"]["update"]["send to a neighbour"] > 0
    assert "send to a neighbour" not in second["bytes"]["scoring"]


def test_dry_run_cuts_hidden_states_with_sequence_parallelism(planned):
    whole, _ = planned["dry_runs"]["TP 1 PP 2"]
    cut, _ = planned["dry_runs"]["TP 2 PP 2"]
    assert cut["calls"]["scoring"]["reduce-scatter"] >= 2 * 2  # twice a layer
    key = "send to a neighbour"
    assert 2 * cut["bytes"]["update"][key] == whole["bytes"]["update"][key]
    assert cut["checkpoint_entries"] > 50


def test_json_has_stable_keys(planned):
    plan = json.loads(planned["json"])
    assert list(plan) == [
        "model", "layout", "gpu", "lengths", "stages", "host_bytes", "flops", "seconds", "assumed",
        "tokens_per_group", "engine", "peak_bytes", "fits", "remedies",
    ]  # fmt: skip
    (stage,) = plan["stages"]
    assert {"build", "use", "held", "in_flight", "peaks", "peak"} <= set(stage)
    assert set(stage["peaks"]) == {"rollout", "validation", "scoring", "update"}
    assert plan["fits"] is True
    assert plan["peak_bytes"] == max(stage["peaks"].values())


def test_tables_say_what_does_not_fit_and_that_no_gpu_was_used(planned):
    text = planned["offloaded"]["False"]["text"]
    assert "It does NOT fit" in text
    assert "nothing here was run on a GPU" in text


@pytest.mark.slow
def test_72b_on_64_gpus_is_planned_within_a_minute_and_4_gib(tmp_path):
    recipe = tmp_path / "large.yaml"
    recipe.write_text("defaults: [base, _self_]\n")
    overrides = [
        "model.hf_path=nowhere/Qwen2.5-VL-72B-Instruct",
        "model.tensor_model_parallel_size=8",
        "model.pipeline_model_parallel_size=4",
        "model.sequence_parallel=true",
        "model.recompute_granularity=full",
        "trainer={max_steps: 1, devices: 8, num_nodes: 8}",
        "algorithm.prompts_per_step=32",
        "data.train.root=nowhere",
        "data.validation.root=nowhere",
    ]
    program = (
        "import resource, sys; from nemo_care.cli import main; status = main(sys.argv[1:]); "
        "used = resource.getrusage(resource.RUSAGE_SELF); "
        "print(used.ru_maxrss * 1024, used.ru_utime + used.ru_stime); sys.exit(status)"
    )
    command = [sys.executable, "-c", program, "plan", "--json", "--config-name", "large"]
    done = subprocess.run(
        [*command, "--config-path", str(tmp_path), *overrides],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    plan, used = done.stdout.strip().splitlines()
    # One core's seconds: the machine may have other work.
    resident, seconds = map(float, used.split())
    assert json.loads(plan)["model"]["parameters"] == 73_410_777_344
    assert len(json.loads(plan)["stages"]) == 4
    assert resident < 4 * 2**30
    assert seconds < 60


def test_only_the_first_replica_of_a_machine_gathers_a_checkpoint():
    from nemo_care.planning.plan import _first_replica_on_a_machine

    recipe = Recipe()
    recipe.trainer.devices, recipe.trainer.num_nodes = 8, 8
    for tensor, pipeline, ranks in ((8, 4, 8), (2, 1, 2), (4, 2, 4), (1, 8, 1), (1, 64, 8)):
        recipe.model.tensor_model_parallel_size = tensor
        recipe.model.pipeline_model_parallel_size = pipeline
        assert _first_replica_on_a_machine(recipe) == ranks, (tensor, pipeline)


def test_eight_bits_add_copies_of_the_layers_weights_and_nothing_else(planned):
    found = planned["eight_bits"]
    # Query, key and value, output, gate and up, down: of two layers a stage.
    layer = 256 * (256 + 2 * 128) + 256 * 256 + 256 * 1024 + 512 * 256
    copies = {
        name: [build["fp8_copies"] for build in variant["builds"]]
        for name, variant in found.items()
    }
    assert copies == {
        "bf16": [0, 0],
        "tensorwise": [2 * 2 * layer] * 2,
        "mxfp8": [2 * 2 * layer * 33 // 32] * 2,
        # Without gradients there is no transposed copy.
        "scoring": [3 * 2 * layer] * 2,
        "ends": [2 * layer, 0],
        # One layer's at a time.
        "full": [2 * layer] * 2,
    }
    for name, variant in found.items():
        for build, plain in zip(variant["builds"], found["bf16"]["builds"], strict=True):
            assert {**build, "fp8_copies": 0} == plain, name


def test_only_passes_in_eight_bits_are_faster(planned):
    seconds = {name: variant["seconds"] for name, variant in planned["eight_bits"].items()}
    plain = seconds["bf16"]
    assert seconds["tensorwise"]["update"] < seconds["ends"]["update"] < plain["update"]
    assert seconds["tensorwise"]["scoring"] == plain["scoring"] > seconds["scoring"]["scoring"]
    assert all(variant["rollout"] == plain["rollout"] for variant in seconds.values())


def test_state_in_cpu_memory_is_held_there_and_comes_for_the_step(planned):
    (plain,), (offloaded,) = (planned["offloaded"][name]["stages"] for name in ("False", "True"))
    assert offloaded["build"] == plain["build"]
    state = plain["build"]["optimizer"]
    assert state == pytest.approx(12 * plain["build"]["parameters"], rel=1e-3)
    assert offloaded["held"] == plain["held"] - state
    for phase in ("rollout", "scoring"):
        assert offloaded["peaks"][phase] == plain["peaks"][phase] - state
    steps = offloaded["use"].pop("optimizer_step"), plain["use"].pop("optimizer_step")
    assert offloaded["use"] == plain["use"]
    # Megatron has some scalars of its own beside the state.
    assert steps[0] - steps[1] == pytest.approx(state, abs=1024)
    hosts = [planned["offloaded"][name]["host_bytes"]["optimizer"] for name in ("False", "True")]
    assert hosts == [0, state]
    times = [planned["offloaded"][name]["seconds"]["update"] for name in ("False", "True")]
    assert times[1] - times[0] == pytest.approx(2 * state / 20e9, rel=1e-3)


def test_advice_is_the_plan_of_the_recipe_with_the_change(planned):
    plain, offloaded = (planned["offloaded"][name] for name in ("False", "True"))
    (line,) = [line for line in plain["remedies"] if line.startswith("optimizer.offload=true")]
    # The state is back for the step: that is the peak with little else to hold.
    assert f"{offloaded['peak_bytes'] / 2**30:.1f} GiB at the peak" in line
    assert f"{offloaded['seconds']['step']:.1f} s per step" in line


@pytest.mark.slow  # the search above holds plans from what is known against new ones, too
def test_a_variant_of_a_plan_is_what_planning_it_anew_gives(on_ranks, small):
    found = on_ranks(None, variants, str(small))[0]
    for change, (reused, anew) in found.items():
        # What a part leaves of a few kilobytes depends on the parts before it.
        assert reused == pytest.approx(anew, abs=2**13), change
    assert {part.partition("=")[0] for change in found for part in change.split(" ")} == {
        "evaluation.samples_per_batch", "rollout.groups_per_batch",
        "algorithm.groups_per_micro_batch", "rollout.vllm.sleep_level",
        "rollout.vllm.gpu_memory_utilization", "algorithm.reference.offload", "optimizer.offload",
        "model.recompute_granularity", "model.tensor_model_parallel_size",
        "model.sequence_parallel", "model.pipeline_model_parallel_size", "trainer.num_nodes",
        "data.max_prompt_tokens",
    }  # fmt: skip
