"""What a Qwen3-VL's checkpoint may say, and what its family makes of it."""

import json
from pathlib import Path

import pytest
import torch
from tiny_qwen3_vl import DEEP_LEVELS, EXPERTS, tiny_qwen3_config, write_tiny_qwen3
from transformers import Qwen3VLForConditionalGeneration

import nemo_care
from nemo_care.errors import InputError
from nemo_care.models.architecture import Experts
from nemo_care.models.families import read_family
from nemo_care.models.hf_tensors import check_weights
from nemo_care.models.precision import check_fp8
from nemo_care.models.transformer_config import check_layout
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.model import FP8Config
from nemo_care.recipe.schema import Recipe
from nemo_care.rollouts.build import check_rollouts

PUBLISHED = Path(nemo_care.__file__).parent / "planning" / "configurations"


@pytest.fixture
def folder(tmp_path):
    raw = tiny_qwen3_config().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


def change(folder, block, **values):
    raw = json.loads((folder / "config.json").read_text())
    (raw[block] if block else raw).update(values)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("size", "billions"),
    [
        *(("2B", 2.13), ("4B", 4.44), ("8B", 8.77), ("32B", 33.36)),
        *(("30B-A3B", 31.07), ("235B-A22B", 235.7)),
    ],
)
def test_published_sizes_have_the_published_number_of_parameters(size, billions):
    family = read_family(PUBLISHED / f"Qwen3-VL-{size}-Instruct")
    shapes = family.tensor_shapes()
    if family.architecture.tied:
        del shapes["lm_head.weight"]
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert count == pytest.approx(billions * 1e9, rel=2e-3)
    assert family.architecture.query_size == 128 * family.architecture.heads
    assert family.architecture.deep_levels == 3


@pytest.mark.parametrize(
    ("block", "values", "message"),
    [
        ("", {"architectures": ["Qwen3VLMoeForConditionalGeneration"]}, "architectures is"),
        ("", {"rope_scaling": {"rope_type": "yarn"}}, r"rope_scaling is .* does not have"),
        ("", {"quantization_config": {"bits": 4}}, "quantization_config is .*quantised"),
        ("text_config", {"tie_word_embeddings": True}, "tie_word_embeddings at the top, false"),
        ("", {"vision_start_token_id": 51}, "vision_start_token_id is 51, no token"),
        ("", {"vision_end_token_id": 7}, "is 7, which another of"),
        ("text_config", {"num_experts": 8}, r"text_config\.num_experts is 8, a key"),
        ("text_config", {"attention_bias": True}, "attention_bias is true; only false"),
        ("text_config", {"use_sliding_window": True}, "use_sliding_window is true"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act is"),
        ("text_config", {"num_key_value_heads": 3}, "no multiple of num_key_value_heads = 3"),
        ("text_config", {"head_dim": 64}, r"mrope_section is .*head_dim / 2 = 32"),
        ("text_config", {"rms_norm_eps": 0.0}, "rms_norm_eps is 0.0"),
        ("text_config", {"rope_theta": 5e6}, "rope_theta is .* make them equal"),
        ("text_config", {"rope_scaling": {"rope_type": "yarn"}}, "rope_type is .*yarn"),
        ("text_config", {"rope_scaling": {"mrope_interleaved": False}}, "only interleaved"),
        ("text_config", {"rope_scaling": {"mrope_section": [4, 6, 6]}}, "make them equal"),
        (
            "text_config",
            {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 6, 6]}},
            "at most a third",
        ),
        ("vision_config", {"deepstack_visual_indexes": [0, 4]}, "deepstack_visual_indexes is"),
        ("vision_config", {"deepstack_visual_indexes": [1, 0]}, "increasing numbers"),
        ("vision_config", {"num_position_embeddings": 10}, "a square number"),
        ("vision_config", {"out_hidden_size": 32}, "they have to be equal"),
        ("vision_config", {"window_size": 112}, "a key that a Qwen3-VL does not have"),
        ("vision_config", {"in_channels": 1}, "in_channels is 1"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(folder, block, values, message):
    read_family(folder)
    change(folder, block, **values)
    with pytest.raises(InputError, match=message):
        read_family(folder)


@pytest.fixture
def with_experts(tmp_path):
    raw = tiny_qwen3_config(EXPERTS).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_experts_per_tok": 1}, "num_experts_per_tok is 1; between 2 and num_experts = 8"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size is 0"),
        ({"norm_topk_prob": False}, "norm_topk_prob is false; only true"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2; only 1"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]; only \[\]"),
        ({"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size is 64, a key"),
    ],
)
def test_experts_that_are_not_computed_are_refused_by_name(with_experts, values, message):
    architecture = read_family(with_experts).architecture
    assert (architecture.experts, architecture.ffn_size) == (Experts(8, 2), 48)
    assert not architecture.tied
    change(with_experts, "text_config", **values)
    with pytest.raises(InputError, match=message):
        read_family(with_experts)


def test_a_model_with_experts_has_no_dense_architecture(with_experts):
    change(with_experts, "", model_type="qwen3_vl")
    with pytest.raises(InputError, match=r"only Qwen3VLForConditionalGeneration is supported"):
        read_family(with_experts)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(expert=3), r"expert_model_parallel_size=3 does not divide .* use 1, 2, 4, 8$"),
        (
            Layout(tensor=2, sequence_parallel=True, expert=2, expert_tensor=32),
            r"expert_tensor_parallel_size=32 does not divide .*size 48",
        ),
        (Layout(tensor=2), r"tensor_model_parallel_size=2: .*set model\.sequence_parallel=true"),
    ],
)
def test_layouts_that_do_not_fit_the_experts_are_refused(with_experts, layout, message):
    architecture = read_family(with_experts).architecture
    check_layout(architecture, Layout(tensor=2, sequence_parallel=True, expert=8))
    with pytest.raises(InputError, match=message):
        check_layout(architecture, layout)


def test_expert_parallelism_of_a_model_without_experts_is_refused(folder):
    architecture = read_family(folder).architecture
    with pytest.raises(InputError, match="expert_model_parallel_size=2: this model has no exp"):
        check_layout(architecture, Layout(expert=2))


def test_eight_bits_and_cuda_graphs_of_experts_are_refused(with_experts):
    architecture = read_family(with_experts).architecture
    with pytest.raises(InputError, match=r"fp8\.enabled=true: .* model with experts"):
        check_fp8(FP8Config(enabled=True), architecture, Layout())
    recipe = Recipe()
    recipe.model.hf_path = str(with_experts)
    check_rollouts(recipe)
    recipe.rollout.cuda_graphs = True
    with pytest.raises(InputError, match=r"cuda_graphs=true: .* model with experts"):
        check_rollouts(recipe)


def test_processor_files_that_make_other_pixels_are_refused(folder):
    file = folder / "video_preprocessor_config.json"
    good = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "patch_size": 7, "do_resize": True}
    file.write_text(json.dumps(good))
    read_family(folder)
    file.write_text(json.dumps(good | {"image_mean": [0.48145466, 0.4578275, 0.40821073]}))
    with pytest.raises(InputError, match=r"says image_mean=.* with which Qwen3-VL was trained"):
        read_family(folder)


def test_a_first_stage_with_fewer_layers_than_deep_features_is_refused():
    architecture = read_family(PUBLISHED / "Qwen3-VL-4B-Instruct").architecture
    check_layout(architecture, Layout(pipeline=12))
    with pytest.raises(InputError, match=r"=18 leaves 36 / 18 layers .*use 12 or less"):
        check_layout(architecture, Layout(pipeline=18))


def test_vllm_gets_the_seconds_of_a_video_s_frames(folder):
    family = read_family(folder)
    times = (0.0, 0.41, 0.83, 1.2, 1.7)
    seconds = [
        number / family.video_fps((3, 4, 4), 0.8) for number in family.frame_numbers(times, 6)
    ]
    # As vLLM's Qwen3VLProcessingInfo does it.
    seconds += [seconds[-1]] * (len(seconds) % 2)
    theirs = [(seconds[n] + seconds[n + 1]) / 2 for n in range(0, len(seconds), 2)]
    assert theirs == family.prompt.patch_times(times, 3)


def test_a_checkpoint_s_tensors_are_checked_by_name_and_shape(tmp_path):
    folder = write_tiny_qwen3(tmp_path / "tiny")
    check_weights(folder)
    change(folder, "vision_config", intermediate_size=64)
    with pytest.raises(InputError, match=r"model\.visual\.blocks\.0\.mlp.* config\.json requires"):
        check_weights(folder)


def test_flops_of_the_vision_tower_are_torch_s_count(folder):
    from torch.utils.flop_counter import FlopCounterMode

    family = read_family(folder)
    family.hf._attn_implementation = "eager"
    tower = Qwen3VLForConditionalGeneration(family.hf).model.visual
    grids = [(2, 4, 6), (1, 2, 2)]
    patches = sum(t * h * w for t, h, w in grids)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.zeros(patches, family.prompt.patching.values), grid_thw=torch.tensor(grids))
    assert family.architecture.deep_levels == DEEP_LEVELS
    assert family.vision_flops(grids) == counter.get_total_flops()
    mergers = [tower.merger, *tower.deepstack_merger_list]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for merger in mergers:
            merger(torch.zeros(patches, family.hf.vision_config.hidden_size))
    assert family.merger_flops(grids) == counter.get_total_flops()
