"""Plans of recipes with rollouts by vLLM: numbers against those computed by hand."""

import math

import pytest
from fake_engines import engines_planned
from made_shapes import write_small_shape

from nemo_care.checks.fit import fit_of
from nemo_care.planning.engines import engine_plan, most_prompts
from nemo_care.planning.gpus import GIB, read_gpu
from nemo_care.planning.shapes import Lengths, read_model_shape
from nemo_care.planning.stage import StageBuild
from nemo_care.planning.work import Clock, Efficiency, StepTime
from nemo_care.recipe.schema import Recipe, replicas_of

SEVEN = read_model_shape("nowhere/Qwen2.5-VL-7B-Instruct").family
H100 = read_gpu("h100-80gb")
# The model keeps some tables from its first pass, whichever that is.
KEPT = 2**14
# Of the small shape. A layer: query, key and value with their bias, output, gate, up and down, two
# norms. Then embedding, output layer and last norm; the vision tower.
LAYER = 256 * 512 + 512 + 256 * 256 + 3 * 256 * 512 + 2 * 256
BLOCK = 64 * 192 + 192 + 64 * 64 + 64 + 3 * 64 * 128 + 2 * 128 + 64 + 2 * 64
VISION = 3 * 2 * 14 * 14 * 64 + 2 * BLOCK + 64 + 2 * (256 * 256 + 256)
PARAMETERS = 4 * LAYER + 2 * 1024 * 256 + 256 + VISION


@pytest.fixture(scope="module")
def planned(tmp_path_factory, on_ranks):
    """What fake worlds say, from a process of their own."""
    small = write_small_shape(tmp_path_factory.mktemp("engines") / "small")
    return on_ranks(None, engines_planned, str(small))[0]


def seven_billion(**keys) -> Recipe:
    """Two replicas of four GPUs, each of which samples four groups of 8."""
    recipe = Recipe()
    recipe.trainer.devices = 8
    recipe.model.tensor_model_parallel_size = 4
    recipe.model.precision.dtype = "bf16"
    recipe.algorithm.prompts_per_step, recipe.algorithm.group_size = 8, 8
    recipe.data.max_prompt_tokens, recipe.rollout.max_completion_tokens = 16384, 768
    recipe.rollout.backend = "vllm"
    recipe.rollout.vllm.tensor_parallel_size = 2
    for key, value in keys.items():
        setattr(recipe.rollout.vllm, key, value)
    return recipe


def seconds(recipe: Recipe) -> StepTime:
    """Of prompts of 1000 tokens and completions of 100, by eight billion parameters."""
    build = StageBuild(2 * 10**9, 8 * 10**9, 4 * 10**9, 8 * 10**9, 12 * 10**9, 8 * 10**9, 4 * 10**9)
    clock = Clock(recipe, SEVEN, Lengths(1000, 100, 0, ()), H100, Efficiency())
    return clock.step([build])


# ------------------------------------------------------------------ memory


def test_planning_needs_no_vllm(planned):
    assert planned["imported"] is False


def test_an_engines_weights_and_cached_tokens_are_those_of_its_part_of_the_model(planned):
    engine = planned["plans"]["level 2"]["engine"]
    assert planned["plans"]["level 2"]["model"]["parameters"] == PARAMETERS
    assert engine["weights"] == PARAMETERS * 4 // 2
    # Keys and values of four layers, two of the four heads, 32 numbers in float32.
    assert engine["bytes_per_token"] == 2 * 4 * 2 * 32 * 4
    assert engine["share"] == int(0.6 * 8 * GIB)
    assert engine["cache_tokens"] == (engine["share"] - PARAMETERS * 2) // 2048
    assert engine["sequence_tokens"] == 320 + 32
    assert engine["cache_sequences"] == engine["cache_tokens"] // 352
    assert engine["need"] == PARAMETERS * 2 + 352 * 2048
    assert planned["plans"]["megatron"]["engine"] is None


def test_ranks_beyond_the_key_value_heads_share_them():
    per_token = {}
    for size in (1, 2, 4, 7):
        engine = engine_plan(
            seven_billion(tensor_parallel_size=size), SEVEN.architecture, 8 * 10**9, H100
        )
        per_token[size] = engine.bytes_per_token
        assert engine.weights == 16 * 10**9 // size
    layers_and_width = 2 * 28 * 128 * 2
    assert per_token == {n: heads * layers_and_width for n, heads in
                         {1: 4, 2: 2, 4: 1, 7: 1}.items()}  # fmt: skip


def test_a_cache_of_its_own_size_counts_where_it_exceeds_the_share():
    small = engine_plan(seven_billion(kv_cache_gib=4.0), SEVEN.architecture, 8 * 10**9, H100)
    assert small.cache == 4 * GIB
    assert small.share == int(0.6 * H100.memory)
    large = engine_plan(seven_billion(kv_cache_gib=60.0), SEVEN.architecture, 8 * 10**9, H100)
    assert large.share == 8 * 10**9 + 60 * GIB
    too_large = engine_plan(seven_billion(kv_cache_gib=75.0), SEVEN.architecture, 8 * 10**9, H100)
    assert "kv_cache_gib=75" in too_large.problem
    # A sequence of 17152 tokens is 0.46 GiB.
    too_small = engine_plan(seven_billion(kv_cache_gib=0.4), SEVEN.architecture, 8 * 10**9, H100)
    assert "0.5 GiB" in too_small.problem
    assert not too_small.fits


def test_engines_of_their_own_leave_scoring_and_update_to_the_training_ranks(planned):
    alone = planned["plans"]["separate"]["stages"]
    for ours, ranks in zip(alone, planned["plans"]["megatron"]["stages"], strict=True):
        wanted = {name: ranks["peaks"][name] for name in ("scoring", "update")}
        assert ours["peaks"] == pytest.approx(wanted, abs=KEPT)
        assert ours["use"]["key_value_cache"] == 0 < ranks["use"]["key_value_cache"]


def test_engines_beside_training_take_their_share_awake_and_a_context_asleep(planned):
    beside, ranks = planned["plans"]["level 2"], planned["plans"]["megatron"]
    share = int(0.6 * 8 * GIB)
    for ours, before in zip(beside["stages"], ranks["stages"], strict=True):
        # Two ranks: 2 GiB for CUDA and NCCL. The weights travel through a buffer of bucket_mib.
        rollout = ours["held"] + 2 * GIB + share + GIB // 2
        assert ours["peaks"] == {
            "rollout": rollout,
            "validation": rollout + ours["use"]["scoring"],
            "scoring": before["peaks"]["scoring"] + GIB,
            "update": pytest.approx(before["peaks"]["update"] + GIB, abs=KEPT),
        }
        assert ours["update_by_recomputation"]["none"] == ours["peaks"]["update"]


def test_engines_that_stay_awake_keep_their_share_in_every_phase(planned):
    (awake,), (asleep,) = (planned["plans"][f"level {n}"]["stages"] for n in (0, 1))
    more = int(0.6 * 8 * GIB) - GIB
    for phase, extra in (("rollout", 0), ("validation", 0), ("scoring", more), ("update", more)):
        assert awake["peaks"][phase] == asleep["peaks"][phase] + extra


def test_weights_of_sleeping_engines_are_in_cpu_memory_at_level_1_only(planned):
    engines = [planned["plans"][f"level {n}"]["host_bytes"]["engines"] for n in (0, 1)]
    assert engines[1] - engines[0] == 4 * PARAMETERS
    assert "engines" not in planned["plans"]["megatron"]["host_bytes"]


def test_a_validation_without_a_reference_is_scored_by_the_policy(planned):
    (stage,) = planned["without reference"]["stages"]
    assert stage["use"]["scoring"] == 0
    # At least the hidden states of a micro-batch of 320 + 4 * 32 tokens.
    assert stage["peaks"]["validation"] - stage["peaks"]["rollout"] > 448 * 256 * 4


# ------------------------------------------------------------------ rollouts side by side


def test_rollouts_are_compared_by_the_plans_of_each(planned):
    """Their parts are measured together, and must not be mixed up."""
    found = planned["compared"]
    for name, alone in found["alone"].items():
        plan = found["plans"][name]
        assert plan["seconds"] == alone["seconds"]
        assert plan["peak_bytes"] == pytest.approx(alone["peak_bytes"], abs=KEPT)
        assert plan["host_bytes"] == sum(alone["host_bytes"].values())
        assert plan["engine"] == alone["engine"]
        for phase, share in plan["shares"].items():
            assert share == plan["seconds"][phase] / plan["seconds"]["step"]
    gpus = {name: (p["training_gpus"], p["engine_gpus"]) for name, p in found["plans"].items()}
    assert gpus == {"megatron": (1, 0), "vllm": (1, 0), "vllm_async": (1, 2)}


def test_the_fastest_rollout_is_named_and_a_refused_one_gives_its_reason(planned):
    found = planned["compared"]
    in_turns = {name: found["plans"][name]["seconds"]["step"] for name in ("megatron", "vllm")}
    assert found["fastest"] == min(in_turns, key=in_turns.get)
    assert found["refused"] == {"missing": "this one can't be composed"}
    assert "missing: this one can't be composed" in found["text"]
    assert "| *vllm |" in " ".join(found["text"].split())
    assert f"The fastest that fits is {found['fastest']}" in found["text"]


# ------------------------------------------------------------------ what does not fit


def test_an_engine_without_room_for_one_sequence_does_not_fit(planned):
    plan = planned["plans"]["share too small"]
    assert plan["peak_bytes"] < plan["gpu"]["budget_bytes"]
    assert plan["fits"] is plan["engine"]["fits"] is False
    (verdict,) = [line for line in plan["text"].splitlines() if line.startswith("It does NOT fit")]
    for words in ("gpu_memory_utilization=0.001", "tensor_parallel_size", "352 tokens"):
        assert words in verdict
    (remedy,) = plan["remedies"]
    # 7.2 of 8 GiB, less one for CUDA, a half for the weights on their way and 0.07 for the model.
    assert remedy.startswith("rollout.vllm.gpu_memory_utilization=0.7: ")
    assert "tensor_parallel_size" in planned["refusals"]["engine"]


def test_an_engine_of_more_gpus_is_offered_where_it_would_do_and_can_be_made(planned):
    # Numbers of GPUs are those of the machine that will train: here, 0 may be an engine's.
    larger_share, more_gpus = planned["plans"]["little for GPUs apart"]["remedies"]
    assert larger_share.startswith("rollout.vllm.gpu_memory_utilization=0.9:")
    # 8.6 MB of each of the two hold half of the 12.7 MB of weights.
    assert more_gpus.startswith("rollout.vllm.tensor_parallel_size=2:")


def test_the_largest_share_that_fits_is_offered(planned):
    plan = planned["plans"]["share too large"]
    assert plan["fits"] is False
    memory, budget = plan["gpu"]["memory_bytes"], plan["gpu"]["budget_bytes"]
    training = max(stage["peak"] for stage in plan["stages"]) - int(0.6 * memory)
    largest = math.floor(100 * (budget - training) / memory) / 100
    (line,) = [line for line in plan["remedies"] if "gpu_memory_utilization" in line]
    assert line.startswith(f"rollout.vllm.gpu_memory_utilization={largest:g} ")
    assert "not enough" not in line
    assert int(largest * memory) + training <= budget < int((largest + 0.01) * memory) + training


def test_no_share_is_offered_where_training_leaves_none(planned):
    plan = planned["plans"]["no share"]
    assert plan["fits"] is False
    assert not any("gpu_memory_utilization" in line for line in plan["remedies"])


def test_what_makes_sampling_in_the_ranks_smaller_is_not_offered_for_engines(planned):
    for name in ("share too large", "no share"):
        text = " ".join(planned["plans"][name]["remedies"])
        assert "groups_per_batch" not in text
        assert "samples_per_batch" not in text


def test_another_layout_is_not_said_to_shrink_the_engines_share(planned):
    plan = planned["plans"]["share too large"]
    # Nearly all is the share: with half of it the plan would fit.
    assert not any("model_parallel_size" in line for line in plan["remedies"])


def test_a_layout_that_makes_no_whole_engines_is_refused(planned):
    assert "tensor_parallel_size=2 does not divide the 1 ranks" in planned["refusals"]["layout"]


def test_search_finds_what_the_plan_says(planned):
    found = planned["search"]["found"]
    assert len(found) == 2  # the two layouts of which an engine of two GPUs can be made
    for peak, planned_peak, time, planned_time, fits in found:
        assert peak == pytest.approx(planned_peak, abs=KEPT)
        assert time == planned_time
        assert fits


def test_search_tells_of_an_engine_that_fits_no_layout(planned):
    (line,) = planned["search"]["told"]
    assert "an engine needs" in line
    assert planned["search"]["nothing"] == 0
    assert "rollout.vllm.tensor_parallel_size" in planned["search"]["hint"]
    assert "groups_per_batch" not in planned["search"]["hint"]


def test_dry_run_samples_nothing_in_ranks_that_do_not(planned):
    assert planned["dry run"] == ["scoring", "update"]


def test_doctor_takes_an_engines_share_of_the_whole_gpu(planned):
    gpu, cpu = planned["doctor"]["GPU"], planned["doctor"]["CPU"]
    assert gpu["engine"] == cpu["engine"] == ""
    # Of 80 GiB, although a quarter of them is in use.
    assert 49 * GIB < gpu["peak"] < 50 * GIB
    # On a CPU engines stay awake: every phase has 6 of 10 GiB less, and sampling half a one more.
    assert cpu["phase"] == "validation"
    assert 7 * GIB < cpu["peak"] < 8 * GIB


def test_doctor_names_an_engine_that_can_not_work(monkeypatch, tmp_path):
    from made_machine import made_machine, made_plan

    recipe = Recipe()
    recipe.trainer.max_steps = 1
    recipe.model.hf_path = recipe.data.train.root = str(tmp_path)
    recipe.exp_manager.explicit_log_dir = str(tmp_path / "run")
    monkeypatch.setattr("nemo_care.checks.fit.found_by", lambda *given: iter(()))
    fit = fit_of(recipe, made_machine(), [], made_plan(engine="an engine needs more"))
    assert "an engine needs more" in fit.problems


# ------------------------------------------------------------------ time


def test_a_rollout_takes_prompts_once_decoding_and_the_weights_transfer():
    # Two engines of two GPUs a replica: two prompts each. A token's products in a layer:
    layer = 2 * 3584 * (3584 + 2 * 512) + 2 * 3584**2 + 6 * 3584 * 18944
    prompt = 28 * (1000 * layer + 500_500 * 4 * 3584) + 2 * 3584 * 152_064
    prefill = prompt / 2 / (989e12 * 0.4) + 28 * 2 * 1000 * 3584 * 2 / 300e9
    # Half of 16 GB of weights; 16 completions, each after 1000 tokens and on average 50 of its
    # own, of 28 layers, two heads, 128 numbers, keys and values.
    read = 8e9 + 16 * 1050 * 28 * 2 * 128 * 2 * 2
    token = read / (3.35e12 * 0.6) + 28 * 50e-6
    wanted = 2 * prefill + 100 * token + 16e9 / 300e9
    assert seconds(seven_billion()).rollout == pytest.approx(wanted, rel=1e-9)


def test_eager_engines_launch_each_layer():
    graphs, eager = seconds(seven_billion()), seconds(seven_billion(enforce_eager=True))
    assert eager.rollout - graphs.rollout == pytest.approx(100 * 28 * 250e-6)


def test_engines_apart_get_their_weights_over_the_network():
    beside = seconds(seven_billion())
    # Four engines of two GPUs, two for each replica, as beside training.
    apart = seconds(seven_billion(placement="separate", gpus=list(range(8, 16))))
    assert apart.rollout - beside.rollout == pytest.approx(16e9 / 40e9 - 16e9 / 300e9)


def test_weights_kept_in_cpu_memory_go_there_and_back():
    anew, kept = seconds(seven_billion(sleep_level=2)), seconds(seven_billion(sleep_level=1))
    assert kept.rollout - anew.rollout == pytest.approx(2 * 8e9 / 20e9)


def test_groups_that_the_cache_does_not_hold_wait():
    # A group has 1000 + 8 * 100 tokens of 28672 bytes: 0.048 GiB. One at a time: twice 100 steps.
    waiting, together = seconds(seven_billion(kv_cache_gib=0.05)), seconds(seven_billion())
    weights_and_launches = 100 * (8e9 / (3.35e12 * 0.6) + 28 * 50e-6)
    assert waiting.rollout - together.rollout == pytest.approx(weights_and_launches)


def test_steps_sampled_together_share_decoding_and_the_weights_transfer():
    """Decoding waits for kernels, whose number does not depend on the number of sequences."""
    recipe = seven_billion(placement="separate", gpus=[8, 9, 10, 11])
    recipe.rollout.asynchronous = True
    one = seconds(recipe).rollout
    recipe.rollout.max_staleness = 2
    two = seconds(recipe).rollout
    assert one / 2 < two < one
    # Without rollout.asynchronous it has no meaning.
    recipe.rollout.asynchronous = False
    assert seconds(recipe).rollout == one


def test_only_asynchronous_steps_hide_the_shorter_part():
    assert StepTime(5.0, 2.0, 1.0).total == 8.0
    assert StepTime(5.0, 2.0, 1.0, asynchronous=True).total == 5.0
    assert StepTime(1.0, 2.0, 3.0, asynchronous=True).total == 5.0
    recipe = seven_billion(placement="separate", gpus=list(range(8, 16)))
    recipe.rollout.asynchronous = True
    step = seconds(recipe)
    assert step.total == max(step.rollout, step.scoring + step.update)
    assert step.as_json()["rollout"] == step.rollout


@pytest.mark.parametrize(
    ("keys", "engines", "prompts"),
    [
        # Four replicas of two GPUs on two machines; eight prompts each.
        ({"tensor_parallel_size": 1}, 8, 4),
        ({"tensor_parallel_size": 2}, 4, 8),
        ({"placement": "separate", "ray_address": "a:1", "engines": 2}, 2, 16),
        ({"placement": "separate", "ray_address": "a:1", "engines": 12}, 12, 3),
        # GPUs of each machine, which the two replicas there share.
        ({"placement": "separate", "gpus": [4, 5], "tensor_parallel_size": 2}, 2, 16),
        ({"placement": "separate", "gpus": [4, 5, 6, 7], "tensor_parallel_size": 2}, 4, 8),
    ],
)
def test_prompts_are_dealt_to_engines_as_the_ranks_deal_them(keys, engines, prompts):
    recipe = seven_billion(**keys)
    recipe.trainer.devices, recipe.trainer.num_nodes = 4, 2
    recipe.model.tensor_model_parallel_size = 2
    recipe.algorithm.prompts_per_step = 32
    assert replicas_of(recipe) == 4
    assert most_prompts(recipe) == prompts
    engine = engine_plan(recipe, SEVEN.architecture, 8 * 10**9, H100)
    assert engine.engines == engines
