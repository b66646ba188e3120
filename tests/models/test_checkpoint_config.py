"""config.json of a checkpoint folder: each key is honoured, or refused by name in one line."""

import json
from pathlib import Path

import pytest
import torch
from golden import hf_model
from made_commands import assert_refused
from made_folders import MISSING, change_json, copied, doubled_config, flat_config
from small_runs import small_recipe

from nemo_care.cli import main
from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.sources import read_training
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.errors import InputError
from nemo_care.models.families import read_family
from nemo_care.models.hf_tensors import check_weights
from nemo_care.models.pipeline import forward_only
from nemo_care.models.video_language_model import ModelInputs
from nemo_care.planning.shapes import _CONFIGURATIONS
from nemo_care.training.build import load_model

MROPE = [4, 6, 6]
YARN = {"type": "yarn", "factor": 4.0, "mrope_section": MROPE}
GRID = (1, 20, 24)  # patches of an image, in windows of 8 x 8


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return copied(checkpoint, tmp_path / "checkpoint")


def assert_one_line(error: InputError, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(InputError) as caught:
        read_family(folder)
    assert_one_line(caught.value, str(folder), *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        # Rope: scaled, contradictory, or not mRoPE of this head.
        ({"text_config__rope_parameters__rope_type": "yarn"}, ['rope_type is "yarn"']),
        ({"text_config__rope_parameters__type": "linear"}, ['rope_parameters.type is "linear"']),
        ({"text_config__rope_scaling": {"type": "dynamic", "factor": 2.0}}, ['"dynamic"']),
        ({"text_config__rope_scaling": {"rope_type": "longrope"}}, ['"longrope"']),
        ({"text_config__rope_parameters__factor": 4.0}, ["rope_parameters.factor is 4.0"]),
        ({"rope_scaling": YARN}, ['rope_scaling.type is "yarn"']),
        ({"text_config__rope_scaling": 4}, ["rope_scaling is 4", "object"]),
        ({"text_config__rope_parameters__partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"text_config__partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5"]),
        ({"text_config__rope_theta": 5e5}, ["rope_theta is 500000.0", "is 10000.0"]),
        ({"rope_theta": 5e5}, ["rope_theta is 500000.0", "is 10000.0"]),
        ({"text_config__rope_parameters__rope_theta": "many"}, ['rope_theta is "many"']),
        ({"text_config__rope_parameters__rope_theta": float("nan")}, ["rope_theta is NaN"]),
        ({"text_config__rope_parameters__mrope_section": MISSING}, ["mrope_section is missing"]),
        ({"text_config__rope_parameters__mrope_section": [16, 24, 24]}, ["[16, 24, 24]", "= 16"]),
        ({"text_config__rope_parameters__mrope_section": [8, 8]}, ["[8, 8]", "three numbers"]),
        ({"text_config__rope_parameters__mrope_section": "4,6,6"}, ["mrope_section", "three"]),
        ({"vision_config__rope_parameters__rope_theta": 500.0}, ["vision_config.rope_parameters"]),
        # Attention and activations.
        ({"text_config__use_sliding_window": True}, ["use_sliding_window is true"]),
        ({"text_config__layer_types": ["sliding_attention"] * 4}, ["layer_types", "sliding"]),
        ({"text_config__layer_types": ["full_attention"] * 3}, ["config.json", "layer_types"]),
        ({"text_config__attention_dropout": 0.1}, ["attention_dropout is 0.1"]),
        ({"text_config__attention_bias": False}, ["attention_bias is false", "queries"]),
        ({"text_config__qkv_bias": False}, ["qkv_bias is false"]),
        ({"text_config__mlp_bias": True}, ["mlp_bias is true"]),
        ({"text_config__is_causal": False}, ["is_causal is false"]),
        ({"text_config__head_dim": 16}, ["head_dim is 16", "= 32"]),
        ({"head_dim": 16}, ["head_dim is 16", "= 32"]),
        ({"text_config__hidden_act": "gelu"}, ['text_config.hidden_act is "gelu"', '"silu"']),
        ({"vision_config__hidden_act": "sinus"}, ['vision_config.hidden_act is "sinus"']),
        # Quantisation, and what nobody knows.
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["quantization_config"]),
        ({"text_config__quantization_config": {"quant_method": "fp8"}}, ["quantization_config"]),
        ({"compression_config": {"format": "int"}}, ["compression_config", "does not have"]),
        ({"per_layer_config": {"0": {"hidden_act": "gelu"}}}, ["per_layer_config"]),
        ({"text_config__final_logit_softcapping": 30.0}, ["final_logit_softcapping is 30.0"]),
        ({"text_config__num_experts": 8}, ["text_config.num_experts is 8"]),
        ({"vision_config__deepstack_visual_indexes": [1]}, ["deepstack_visual_indexes"]),
        # Other kinds of model.
        ({"model_type": "qwen2_vl"}, ["qwen2_vl", "supported: qwen2_5_vl"]),
        ({"model_type": "no_such_model"}, ["no_such_model", "supported: qwen2_5_vl"]),
        ({"model_type": MISSING}, ["supported: qwen2_5_vl"]),
        ({"text_config__model_type": "qwen3_moe"}, ['model_type is "qwen3_moe"']),
        ({"vision_config__model_type": ["qwen2_5_vl"]}, ["vision_config.model_type"]),
        ({"architectures": ["Qwen2_5_VLForSequenceClassification"]}, ["architectures"]),
        ({"vision_config": MISSING}, ["vision_config is missing"]),
        ({"text_config": [1]}, ["text_config is [1]"]),
        # Sizes and ids that no model can have.
        ({"text_config__num_hidden_layers": 0}, ["config.json", "num_hidden_layers"]),
        ({"text_config__hidden_size": "64"}, ["config.json", "hidden_size"]),
        ({"text_config__num_attention_heads": 3}, ["hidden_size is 64", "num_attention_heads = 3"]),
        ({"text_config__rms_norm_eps": -1e-6}, ["rms_norm_eps is -1e-06"]),
        ({"text_config__hidden_size": 128}, ["head_dim / 2 = 32"]),
        ({"vision_config__out_hidden_size": 32}, ["out_hidden_size is 32", "64"]),
        ({"vision_config__patch_size": [14, 14]}, ["patch_size is [14, 14]"]),
        ({"vision_config__spatial_patch_size": 16}, ["spatial_patch_size is 16"]),
        ({"vision_config__in_channels": 4}, ["in_channels is 4", "only 3"]),
        ({"vision_config__in_chans": 1}, ["in_chans is 1", "only 3"]),
        ({"vision_config__num_heads": 3}, ["vision_config.hidden_size is 32", "4 * num_heads"]),
        ({"vision_config__window_size": 14}, ["window_size is 14", "28"]),
        ({"image_token_id": 151655}, ["image_token_id is 151655", "vocabulary of 51"]),
        ({"image_token_id": 7}, ["image_token_id is 7, which another of image_token_id, video"]),
        ({"text_config__image_token_id": 9}, ["text_config.image_token_id is 9", "6"]),
        ({"dtype": "float7"}, ["config.json", "float7"]),
        # text_config wins in transformers; what the top says is dropped without a word.
        ({"rms_norm_eps": 1e-5}, ["rms_norm_eps is 1e-05", "text_config.rms_norm_eps is 1e-06"]),
        ({"vocab_size": 64}, ["vocab_size is 64", "text_config.vocab_size is 51"]),
        ({"text_config__tie_word_embeddings": True}, ["tie_word_embeddings is false"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_computed_is_refused_by_name(folder, changes, parts):
    change_json(folder / "config.json", **changes)
    refused(folder, *parts)


@pytest.mark.parametrize("place", ["", "text_config__"])
def test_rope_scaling_of_the_flat_layout_is_refused(folder, place):
    """As Qwen's own pages say to add it: beside a text_config it would be dropped silently."""
    config = json.loads((folder / "config.json").read_text())
    layout = doubled_config(config) if place else flat_config(config)
    (folder / "config.json").write_text(json.dumps(layout))
    change_json(folder / "config.json", **{f"{place}rope_scaling": YARN})
    refused(folder, 'rope_scaling.type is "yarn"')


@pytest.mark.parametrize("section", [MISSING, None])
def test_a_flat_layout_without_mrope_section_is_refused(folder, section):
    flat = flat_config(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text(json.dumps(flat))
    value = MISSING if section is MISSING else None
    change_json(folder / "config.json", rope_scaling=value)
    refused(folder, "mrope_section is missing")


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config__use_cache": False},
        {"text_config__head_dim": 32, "head_dim": 32},
        {"qkv_bias": True, "text_config__partial_rotary_factor": 1.0},
        {"_name_or_path": "somewhere"},
        {"transformers_version": "4.41.2"},
        {"text_config__initializer_range": 1.0},
        {"text_config__max_window_layers": 0, "text_config__sliding_window": 8},
        {"text_config__max_position_embeddings": 16},
        {"text_config__temperature": 0.1},
        {"text_config__some_switch": False},
        {"vision_start_token_id": 5},
        {"dtype": "bfloat16"},
    ],
    ids="-".join,
)
def test_what_changes_nothing_is_accepted(folder, checkpoint, changes):
    change_json(folder / "config.json", **changes)
    assert read_family(folder).signature() == read_family(checkpoint).signature()


@pytest.mark.parametrize("layout", [flat_config, doubled_config])
def test_older_layouts_say_the_same(folder, checkpoint, layout):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(layout(config)))
    assert read_family(folder).signature() == read_family(checkpoint).signature()


@pytest.mark.parametrize("name", [path.name for path in sorted(_CONFIGURATIONS.iterdir())])
def test_published_configurations_are_accepted_as_they_are_and_as_saved_again(name, tmp_path):
    family = read_family(_CONFIGURATIONS / name)
    family.hf.save_pretrained(tmp_path)
    assert read_family(tmp_path).signature() == family.signature()


# ------------------------------------------------------------------ honoured


def made_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text with an image in it: token ids [1, S], positions [3, 1, S], patches, grid."""
    generator = torch.Generator().manual_seed(5)
    _, height, width = GRID
    count = height * width // 4
    ids = torch.randint(8, 51, (count + 12,), generator=generator)
    ids[6 : 6 + count] = 6
    at = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    positions = torch.arange(count + 12).repeat(3, 1)
    positions[:, 6 : 6 + count] = 6 + torch.stack([torch.zeros_like(at[0]), *at]).flatten(1)
    pixels = torch.randn(height * width, 3 * 2 * 14 * 14, generator=generator)
    return ids[None], positions[:, None], pixels, torch.tensor([GRID])


def our_logits(folder: Path, world: Path, ranks) -> torch.Tensor:
    ids, positions, pixels, grid = made_inputs()
    model = load_model(small_recipe(folder, world), ranks).eval()
    rows, columns = (ids == 6).nonzero(as_tuple=True)
    inputs = ModelInputs(ids, positions, pixels, grid, columns * len(ids) + rows)
    (logits,) = forward_only(
        model,
        [inputs],
        inputs_of=lambda inputs: inputs,
        result_of=lambda hidden, inputs: model.logits(hidden),
    )
    return logits[..., :51]


def their_logits(folder: Path) -> torch.Tensor:
    ids, positions, pixels, grid = made_inputs()
    with torch.no_grad():
        return hf_model(folder)(
            input_ids=ids,
            position_ids=positions,
            pixel_values=pixels,
            image_grid_thw=grid,
            mm_token_type_ids=(ids == 6).long(),
        ).logits


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config__rms_norm_eps": 0.5},
        {"text_config__rope_parameters__rope_theta": 50.0},
        {"text_config__rope_parameters__mrope_section": [2, 3, 11]},
        {"vision_config__hidden_act": "gelu"},
        {"vision_config__fullatt_block_indexes": [0, 1]},
        {"vision_config__window_size": 56},
        {"vision_config__num_heads": 2},
        {"text_config__num_attention_heads": 4, "text_config__num_key_value_heads": 4,
         "text_config__rope_parameters__mrope_section": [2, 3, 3]},
    ],
    ids="-".join,
)  # fmt: skip
def test_what_is_honoured_is_computed_as_hugging_face_does(
    folder, checkpoint, changes, world, ranks
):
    change_json(folder / "config.json", **changes)
    check_weights(folder)
    wanted = their_logits(folder)
    assert (wanted - their_logits(checkpoint)).abs().max() > 1e-3
    torch.testing.assert_close(our_logits(folder, world, ranks), wanted, atol=1e-4, rtol=0)


def test_tokens_per_second_spread_a_video_s_positions(folder, world):
    data = small_recipe(folder, world).data
    sample = read_training(data, seed=1).sources[0].samples[0]
    times = []
    for tokens in (2, 8):
        change_json(folder / "config.json", vision_config__tokens_per_second=tokens)
        form = read_family(folder).prompt
        prompt = PromptBuilder(data, form, load_tokenizer(folder, form)).build(0, sample)
        time = prompt.position_ids[0, prompt.is_vision]
        times.append((time - time[0]).tolist())
        seconds = torch.arange(len(time)) * prompt.seconds_per_grid[0]
        assert times[-1] == (seconds * tokens).long().tolist()
    assert times[0] != times[1]


# ------------------------------------------------------------------ the command line


@pytest.mark.parametrize("command", ["train", "evaluate", "plan"])
def test_a_command_ends_with_one_line(folder, tmp_path, capfd, world, command):
    change_json(folder / "config.json", text_config__rope_parameters__rope_type="yarn")
    status = main(
        [
            *(command, "--config-name", "tiny_cpu", f"model.hf_path={folder}"),
            f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
            *(f"data.{part}.kind=jsonl" for part in ("train", "validation")),
            *(f"data.{part}.root={world}" for part in ("train", "validation")),
        ]
    )
    result = status, capfd.readouterr().err
    assert_refused(result, f"model.hf_path={folder}", 'rope_type is "yarn"')
