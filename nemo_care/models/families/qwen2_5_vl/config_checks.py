"""What a Qwen2.5-VL's config.json may say (see `config_keys.py`)."""

from collections.abc import Mapping
from typing import Any

from transformers import Qwen2_5_VLConfig

from nemo_care.models.families.config_keys import (
    COMPUTED,
    QUANTISED,
    ROPE,
    VISION_COMPUTED,
    Refuse,
    check_equal,
    check_keys,
    check_mrope_section,
    check_names,
    check_rope_block,
    check_text_numbers,
    check_tokens,
    check_tower,
    check_tower_sizes,
    divides,
    positive,
    shown,
)

NAME = "Qwen2.5-VL"
MODEL_TYPE = "qwen2_5_vl"
_ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"

# What text_config holds, or the top of the older flat layout. transformers' attention knows no
# limit of positions without rope scaling; windows are refused as a whole.
_TEXT = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "hidden_act", "rms_norm_eps", "layer_types"),
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "head_dim"),
    *("max_position_embeddings", "use_sliding_window", "sliding_window", "max_window_layers"),
    *("attention_dropout", "tie_word_embeddings", "qkv_bias"),
}
_VISION = {
    *("depth", "hidden_size", "hidden_act", "intermediate_size", "num_heads", "in_channels"),
    *("in_chans", "patch_size", "spatial_patch_size", "spatial_merge_size", "temporal_patch_size"),
    *("tokens_per_second", "window_size", "out_hidden_size", "fullatt_block_indexes"),
    *("rope_parameters", "tie_word_embeddings"),
}
_VISION_TOKENS = ("image_token_id", "video_token_id")
# Releases of transformers 4 repeat some of them in text_config.
_TOKENS = {*_VISION_TOKENS, "vision_start_token_id", "vision_end_token_id", "vision_token_id"}
_TOP = {"text_config", "vision_config", *_TOKENS, *_TEXT}
_COMPUTED = COMPUTED | {
    # Queries, keys and values have a bias, and nothing else has one.
    "attention_bias": (None,),
    "qkv_bias": (None, True),
}
_VISION_COMPUTED = VISION_COMPUTED | {"in_chans": VISION_COMPUTED["in_channels"]}
_ROPE_BLOCKS = ("rope_scaling", "rope_parameters")
# Keys whose value at the top is compared in another way, has one value only, or says nothing,
# because no window is used.
_COMPARED_APART = {
    *_COMPUTED,
    *("rope_scaling", "rope_parameters", "rope_theta", "tie_word_embeddings", "head_dim"),
    *("sliding_window", "max_window_layers", "max_position_embeddings"),
}
_TEXT_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads"),
)
_VISION_SIZES = (
    *("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "window_size"),
    *("spatial_merge_size", "temporal_patch_size", "tokens_per_second", "out_hidden_size"),
)
_REMEDIES = {
    "quantization_config": QUANTISED,
    "attention_bias": f"a {NAME} has biases at queries, keys and values alone: remove the key "
    "if the weights have just those",
}

# The places that hold text keys, by the prefix of their names.
_Texts = Mapping[str, Mapping[str, Any]]


def check_stated(raw: Mapping[str, Any], refuse: Refuse) -> None:
    """Refuse what config.json says and the model would not do, before transformers reads it.

    Args:
        raw: config.json.
        refuse: Called with what is wrong; raises.
    """
    vision, nested = raw.get("vision_config"), raw.get("text_config")
    if not isinstance(vision, dict):
        refuse(f"vision_config is missing; use the config.json of a {NAME} checkpoint")
    if nested is not None and not isinstance(nested, dict):
        refuse(f"text_config is {shown(nested)} where an object is needed")
    check_names(raw, _ARCHITECTURE, MODEL_TYPE, refuse)
    for prefix, part, known, computed in (
        ("", raw, _TOP, _COMPUTED),
        ("text_config.", nested or {}, _TEXT | _TOKENS, _COMPUTED),
        ("vision_config.", vision, _VISION, _VISION_COMPUTED),
    ):
        check_keys(prefix, part, known, computed, _REMEDIES, NAME, refuse)
    _check_rope({"": raw, "text_config.": nested or {}}, refuse)
    check_tower(vision, refuse)
    side, stated_side = vision.get("patch_size", 14), vision.get("spatial_patch_size")
    if stated_side not in (None, side):
        refuse(f"vision_config.spatial_patch_size is {shown(stated_side)}, patch_size {side}")


def _check_rope(texts: _Texts, refuse: Refuse) -> None:
    """Plain mRoPE alone, stated once or alike everywhere."""
    for prefix, text in texts.items():
        for key in _ROPE_BLOCKS:
            name, rope = f"{prefix}{key}", text.get(key)
            if rope is None:
                continue
            remedy = "rope scaling is not supported, only mrope without it"
            check_rope_block(name, rope, ROPE, remedy, refuse)
    for part in ("rope_theta", "mrope_section"):
        check_equal(_stated_rope(texts, part), refuse)


def _stated_rope(texts: _Texts, part: str) -> list[tuple[str, Any]]:
    """Everywhere that a value of rope is stated: its name and value."""
    found = []
    for prefix, text in texts.items():
        places = {"": text, **{f"{key}.": text.get(key) or {} for key in _ROPE_BLOCKS}}
        found += [
            (f"{prefix}{inner}{part}", block[part])
            for inner, block in places.items()
            if block.get(part) is not None
        ]
    return found


def check_values(raw: Mapping[str, Any], hf: Qwen2_5_VLConfig, refuse: Refuse) -> None:
    """Refuse values that no model can have, and those that transformers has dropped.

    Args:
        raw: config.json.
        hf: What transformers makes of it, its defaults filled in.
        refuse: Called with what is wrong; raises.
    """
    _check_agreement(raw, hf, refuse)
    _check_text(raw, hf.text_config, refuse)
    _check_vision(hf.vision_config, hf.text_config, refuse)
    check_tokens(hf, _VISION_TOKENS, refuse)


def _check_text(raw: Mapping[str, Any], text: Any, refuse: Refuse) -> None:
    positive("text_config", text, _TEXT_SIZES, refuse)
    divides("hidden_size", "num_attention_heads", text, refuse)
    check_text_numbers(text, refuse)
    head_dim = text.hidden_size // text.num_attention_heads
    for block in (raw, raw.get("text_config") or {}):
        if block.get("head_dim") not in (None, head_dim):
            refuse(
                f"head_dim is {shown(block['head_dim'])}; only hidden_size / num_attention_heads "
                f"= {head_dim} is supported"
            )
    check_mrope_section(text, head_dim, refuse, interleaved=False)
    if set(text.layer_types) != {"full_attention"}:
        refuse(f"layer_types is {shown(text.layer_types)}; only full_attention is supported")


def _check_vision(vision: Any, text: Any, refuse: Refuse) -> None:
    check_tower_sizes(vision, text, _VISION_SIZES, refuse)
    least = vision.patch_size * vision.spatial_merge_size
    if vision.window_size < least:
        refuse(
            f"vision_config.window_size is {vision.window_size}; at least patch_size * "
            f"spatial_merge_size = {least} is needed"
        )


def _check_agreement(raw: Mapping[str, Any], hf: Qwen2_5_VLConfig, refuse: Refuse) -> None:
    """What the top and text_config both state must be equal: transformers drops one of the two."""
    text = hf.text_config
    for name, value in _stated_rope({"": raw}, "rope_theta"):
        if value != text.rope_parameters["rope_theta"]:
            refuse(
                f"{name} is {shown(value)}, which transformers does not read there: it computes "
                f"with {shown(text.rope_parameters['rope_theta'])}; state it in text_config"
            )
    nested = raw.get("text_config")
    if nested is None:
        return
    tie = "tie_word_embeddings"
    if tie in raw and tie in nested and bool(raw[tie]) != bool(nested[tie]):
        refuse(
            f"{tie} is {shown(raw[tie])}, but text_config.{tie} is {shown(nested[tie])}; make "
            "them equal"
        )
    for key in _VISION_TOKENS:
        if nested.get(key) not in (None, getattr(hf, key)):
            refuse(f"text_config.{key} is {shown(nested[key])}, but {key} is {getattr(hf, key)}")
    for key in sorted((_TEXT & raw.keys()) - _COMPARED_APART):
        effective = getattr(text, key, None)
        if raw[key] is not None and raw[key] != effective:
            refuse(
                f"{key} is {shown(raw[key])}, but text_config.{key} is {shown(effective)}; make "
                "them equal"
            )
