"""The files of a checkpoint folder: what is read, what is not, and what is refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from made_commands import assert_refused
from made_folders import (
    INDEX,
    MISSING,
    WEIGHTS,
    change_json,
    change_weights,
    copied,
    split_weights,
    write_index,
)
from safetensors.torch import load_file, save_file
from small_runs import small_recipe

from nemo_care.checks.recipe import check_training_inputs
from nemo_care.cli import main
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.errors import InputError
from nemo_care.models.families import read_family
from nemo_care.models.families.patches import CLIP_MEAN, CLIP_STD
from nemo_care.models.hf_tensors import check_weights
from nemo_care.models.weights import iterate_hf_weights
from nemo_care.training.build import load_model

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
EMBEDDING = "model.embed_tokens.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORMALISED = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

OTHER_PIXELS = [
    ("image_mean", [0.5, 0.5, 0.5]),
    ("image_mean", [0.48145466]),
    ("image_std", [0.5, 0.5, 0.5]),
    ("image_std", 0.5),
    ("rescale_factor", 1 / 127.5),
    ("do_normalize", False),
    ("do_rescale", False),
    ("do_resize", False),
    ("do_convert_rgb", False),
    ("do_center_crop", True),
    ("resample", 2),
    ("patch_size", 16),
    ("temporal_patch_size", 1),
    ("merge_size", 4),
]


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    return copied(checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def refused(folder, world):
    """The check that every training run begins with refuses the folder, in one line."""

    def refused(*parts: str) -> None:
        with pytest.raises(InputError) as caught:
            check_training_inputs(small_recipe(folder, world))
        message = str(caught.value)
        assert "\n" not in message
        for part in (str(folder), *parts):
            assert part in message

    return refused


# ------------------------------------------------------------------ weights


def loaded(folder: Path, world: Path, ranks) -> dict[str, torch.Tensor]:
    return dict(iterate_hf_weights(load_model(small_recipe(folder, world), ranks)))


def test_the_index_decides_which_tensors_are_read(folder, checkpoint, world, ranks, capfd):
    weight_map = split_weights(folder)
    # Another file, as Mistral's consolidated ones, and a stale copy of a tensor in another shard.
    save_file({QUERY: torch.zeros(64, 64)}, folder / "consolidated.safetensors")
    other = FIRST if weight_map[QUERY] == SECOND else SECOND
    shard = load_file(folder / other)
    save_file({**shard, QUERY: torch.zeros(64, 64)}, folder / other)
    recipe = small_recipe(folder, world)
    check_training_inputs(recipe)
    check_training_inputs(recipe)
    lines = [line for line in capfd.readouterr().err.splitlines() if "not read" in line]
    assert len(lines) == 1
    for part in (str(folder), INDEX, "consolidated.safetensors", f"{QUERY} in {other}"):
        assert part in lines[0]
    ours, original = loaded(folder, world, ranks), load_file(checkpoint / WEIGHTS)
    assert ours.keys() == original.keys()
    assert all(torch.equal(ours[name], original[name]) for name in original)


def test_two_files_that_give_one_tensor_are_refused(folder, refused):
    save_file({QUERY: torch.zeros(64, 64)}, folder / "adapter_model.safetensors")
    refused(QUERY, "another file")


def test_two_names_of_one_tensor_are_refused(folder, refused):
    change_weights(
        folder, lambda all_: all_.update({f"model.language_{EMBEDDING}": all_[EMBEDDING].clone()})
    )
    refused(EMBEDDING, "another file or name")


def test_longer_names_of_transformers_are_read(folder, checkpoint, world, ranks):
    weights = load_file(folder / WEIGHTS)
    longer = {
        name.replace("visual.", "model.visual.", 1)
        if name.startswith("visual.")
        else name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in weights.items()
    }
    assert longer.keys() != weights.keys()
    save_file(longer, folder / WEIGHTS)
    check_weights(folder)
    ours = loaded(folder, world, ranks)
    assert all(torch.equal(ours[name], weights[name]) for name in weights)


@pytest.mark.parametrize(
    ("weight_map", "parts"),
    [
        (None, ["no weight_map"]),
        ({}, ["no weight_map"]),
        ([QUERY], ["no weight_map"]),
        ({QUERY: 1}, [QUERY, "not a file name"]),
        ({QUERY: "../model.safetensors"}, [QUERY, "not a file name"]),
        ({QUERY: WEIGHTS}, ["tensor", "is missing"]),
        ({"model.no_such.weight": WEIGHTS}, ["model.no_such.weight", "does not have it"]),
        ({QUERY: "model-00009-of-00009.safetensors"}, ["model-00009-of-00009", "is missing"]),
    ],
)
def test_an_index_that_is_none_is_refused(folder, refused, weight_map, parts):
    write_index(folder, weight_map)
    refused(*parts)


def test_a_missing_shard_is_named(folder, refused):
    split_weights(folder)
    (folder / SECOND).unlink()
    refused(SECOND, "is missing", INDEX)


def test_a_missing_shard_without_an_index_is_a_missing_tensor(folder, refused):
    split_weights(folder)
    (folder / SECOND).unlink()
    (folder / INDEX).unlink()
    refused("tensor ", "is missing")


@pytest.mark.parametrize("size", [0, 5, 700, -1])
def test_a_torn_file_of_weights_is_named(folder, refused, size):
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:size])
    refused(str(file), "not a readable safetensors file", "download it again")


@pytest.mark.parametrize(
    ("name", "tensor", "parts"),
    [
        (QUERY, torch.zeros(64, 64, dtype=torch.int8), ["holds I8", "quantised"]),
        (QUERY, torch.zeros(64, 64).to(torch.float8_e4m3fn), ["holds F8_E4M3", "quantised"]),
        (QUERY, torch.zeros(64, 32), ["64x32", "64x64"]),
        (EMBEDDING, torch.zeros(64, 64), ["vocab_size is 51", "64 rows"]),
        (EMBEDDING, torch.zeros(48, 64), ["vocab_size is 51", "48 rows"]),
        ("lm_head.weight", torch.zeros(64, 64), ["lm_head.weight", "vocab_size is 51"]),
        (f"{QUERY}_scale", torch.ones(1), [f"{QUERY}_scale", "scales of quantised"]),
        (QUERY.replace("weight", "qweight"), torch.ones(1), ["q_proj.qweight"]),
        ("model.layers.0.self_attn.o_proj.bias", torch.ones(64), ["o_proj.bias"]),
        ("model.layers.4.mlp.up_proj.weight", torch.ones(160, 64), ["layers.4"]),
        ("custom_text_proj.weight", torch.ones(1), ["custom_text_proj.weight", "not part"]),
        (QUERY, None, [QUERY, "is missing"]),
        ("lm_head.weight", None, ["lm_head.weight", "is missing"]),
        ("visual.merger.ln_q.weight", None, ["visual.merger.ln_q.weight", "is missing"]),
    ],
)
def test_tensors_that_are_not_the_model_s_are_refused(folder, refused, name, tensor, parts):
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor

    change_weights(folder, change)
    refused(*parts)


def test_frequencies_that_every_model_computes_anew_are_no_fault(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(folder, lambda weights: weights.update({name: torch.ones(16)}))
    check_weights(folder)


@pytest.mark.parametrize("place", ["", "text_config__"])
def test_a_tied_model_with_an_output_layer_of_its_own_is_refused(folder, refused, place):
    if place:
        change_json(folder / "config.json", tie_word_embeddings=MISSING)
    change_json(folder / "config.json", **{f"{place}tie_word_embeddings": True})
    refused("tie_word_embeddings", "lm_head.weight differs")
    change_weights(folder, lambda all_: all_.update({"lm_head.weight": all_[EMBEDDING].clone()}))
    check_weights(folder)


# ------------------------------------------------------------------ JSON files and templates

JSON_FILES = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"),
    *("special_tokens_map.json", "chat_template.json", INDEX),
]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        *((name, b'{"a": ', "not valid JSON") for name in JSON_FILES),
        ("config.json", b"", "not valid JSON"),
        ("config.json", b'{"a": "\xff\xfe"}', "not UTF-8"),
        ("config.json", b"[" * 100_000, "not valid JSON"),
        ("config.json", b"[1]", "not a JSON object"),
        ("config.json", b'"text"', "not a JSON object"),
    ],
    ids=[*JSON_FILES, "empty", "not UTF-8", "deep", "list", "text"],
)
def test_a_file_that_is_no_json_object_is_named(folder, refused, name, content, reason):
    (folder / name).write_bytes(content)
    if name == "chat_template.json":
        # It counts where the tokenizer has no template of its own.
        (folder / "chat_template.jinja").unlink()
    refused(str(folder / name), reason)


@pytest.mark.parametrize(
    ("name", "changes", "parts"),
    [
        ("generation_config.json", {"eos_token_id": "<|im_end|>"}, ["is '<|im_end|>'"]),
        ("generation_config.json", {"eos_token_id": [2, 151645]}, ["eos_token_id", "151645"]),
        ("generation_config.json", {"eos_token_id": [[2]]}, ["eos_token_id is [[2]]"]),
        ("generation_config.json", {"eos_token_id": {"id": 2}}, ["eos_token_id"]),
        ("tokenizer.json", {"model": {"type": "no such"}}, ["not a tokenizer"]),
        ("tokenizer.json", {"model": MISSING}, ["not a tokenizer"]),
        ("tokenizer.json", {"added_tokens": [{"id": -1}]}, ["not a tokenizer"]),
    ],
)
def test_a_file_of_another_shape_is_named(folder, refused, name, changes, parts):
    change_json(folder / name, **changes)
    refused(str(folder / name), *parts)


def test_a_folder_without_a_tokenizer_is_refused(folder, refused):
    (folder / "tokenizer.json").unlink()
    refused("no usable tokenizer", "tokenizer.json is missing")


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}",
        "{{ messages[0].content.nothing.at.all }}",
        "{{ raise_exception('not for you') }}",
        "{{ 1 // 0 }}",
    ],
)
@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_template_that_can_t_be_used_is_named(folder, refused, name, template):
    (folder / "chat_template.jinja").unlink()
    content = template if name.endswith("jinja") else json.dumps({"chat_template": template})
    (folder / name).write_text(content)
    refused(str(folder / name), "the chat template can't be used")


def test_a_template_that_is_not_text_is_named(folder, refused):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    refused(str(folder / "chat_template.jinja"), "not UTF-8")
    (folder / "chat_template.jinja").unlink()
    change_json(folder / "chat_template.json", chat_template=[1])
    refused(str(folder / "chat_template.json"), "no text chat_template")


def test_config_json_says_where_completions_end_without_a_generation_config(folder):
    (folder / "generation_config.json").unlink()
    change_json(folder / "config.json", text_config__eos_token_id=[2, 0])
    assert load_tokenizer(folder, read_family(folder).prompt).eos_ids == {0, 2}


# ------------------------------------------------------------------ code, and other pixels


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("config.json", "auto_map"),
        ("config.json", "text_config__auto_map"),
        ("config.json", "vision_config__auto_map"),
        ("generation_config.json", "auto_map"),
        ("tokenizer_config.json", "auto_map"),
        ("preprocessor_config.json", "auto_map"),
        ("video_preprocessor_config.json", "auto_map"),
        ("processor_config.json", "auto_map"),
        ("processor_config.json", "image_processor__auto_map"),
    ],
)
def test_code_of_a_checkpoint_is_never_run_nor_asked_about(
    folder, refused, monkeypatch, tmp_path, name, path
):
    def asked(*args):
        raise AssertionError("transformers asked whether to run code")

    monkeypatch.setattr("builtins.input", asked)
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    change_json(folder / name, **{path: {"AutoConfig": "own.C", "AutoTokenizer": ["own.T", None]}})
    refused(str(folder / name), "auto_map", "remove auto_map")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("video_preprocessor_config.json", "image_mean", [0.5, 0.5, 0.5]),
        ("processor_config.json", "image_processor__image_mean", [0.5, 0.5, 0.5]),
        *(("preprocessor_config.json", *said) for said in OTHER_PIXELS),
    ],
)
def test_a_processor_that_makes_other_pixels_is_refused(folder, refused, name, setting, value):
    change_json(folder / name, **{setting: value})
    refused(name, f"{setting.rpartition('__')[2]}={json.dumps(value)}", "only ")


def test_the_published_processor_is_what_is_done_here(folder, checkpoint, world):
    change_json(
        folder / "preprocessor_config.json",
        **NORMALISED,
        min_pixels=3136,
        max_pixels=12845056,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        image_processor_type="Qwen2VLImageProcessor",
        processor_class="Qwen2_5_VLProcessor",
    )
    check_training_inputs(small_recipe(folder, world))
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    Qwen2VLImageProcessorPil().save_pretrained(folder)
    assert "image_mean" in (folder / "preprocessor_config.json").read_text()
    check_training_inputs(small_recipe(folder, world))
    for name, values in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD)):
        torch.testing.assert_close(values.flatten(), torch.tensor(NORMALISED[name]))


# ------------------------------------------------------------------ commands


def test_an_evaluated_model_must_compute_alike(folder, checkpoint, tmp_path, capfd, world):
    """Its weights fit the model of model.hf_path, but it was trained with other positions."""
    change_json(folder / "config.json", text_config__rope_parameters__rope_theta=5e5)
    status = main(
        [
            *("evaluate", "--config-name", "tiny_cpu", f"evaluation.checkpoint={folder}"),
            f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
            *("data.validation.kind=jsonl", f"data.validation.root={world}"),
        ]
    )
    result = status, capfd.readouterr().err
    assert_refused(result, f"evaluation.checkpoint={folder}", "rope_theta is 500000.0")
