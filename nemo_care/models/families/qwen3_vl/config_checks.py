"""What a Qwen3-VL's config.json may say (see `config_keys.py`)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

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
    positive,
    shown,
)

NAME = "Qwen3-VL"
Config: TypeAlias = Qwen3VLConfig | Qwen3VLMoeConfig

_TEXT_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
_VISION_SIZES = (
    *("depth", "hidden_size", "intermediate_size", "num_heads", "patch_size", "spatial_merge_size"),
    *("temporal_patch_size", "out_hidden_size", "num_position_embeddings"),
)
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_TOP = {"text_config", "vision_config", "tie_word_embeddings", *_TOKENS}
_TEXT = {
    *_TEXT_SIZES,
    *("rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings"),
    "tie_word_embeddings",
}


@dataclass(frozen=True)
class Kind:
    """What differs between a model without experts and one with them.

    Attributes:
        model_type: in config.json.
        architecture: transformers' class of the whole model, in config.json.
        config: transformers' class of the configuration.
        sizes: of the language model's feed-forward networks, as text_config names them.
        known: further keys of text_config that change nothing.
        computed: further keys of text_config with the values that are computed.
    """

    model_type: str
    architecture: str
    config: type[Config]
    sizes: tuple[str, ...]
    known: frozenset[str] = frozenset()
    computed: Mapping[str, tuple[object, ...]] = field(default_factory=dict)


DENSE = Kind("qwen3_vl", "Qwen3VLForConditionalGeneration", Qwen3VLConfig, ("intermediate_size",))
EXPERTS = Kind(
    "qwen3_vl_moe",
    "Qwen3VLMoeForConditionalGeneration",
    Qwen3VLMoeConfig,
    ("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    # No layer is without experts; no auxiliary loss is added; windows are refused as a whole.
    known=frozenset(
        (
            *("intermediate_size", "num_local_experts", "router_aux_loss_coef"),
            *("output_router_logits", "sliding_window"),
        )
    ),
    computed={
        "decoder_sparse_step": (None, 1),
        "mlp_only_layers": (None, []),
        # The weights of a token's experts add up to 1.
        "norm_topk_prob": (None, True),
    },
)
_VISION = {*_VISION_SIZES, "hidden_act", "deepstack_visual_indexes", "rope_parameters"}
_COMPUTED = COMPUTED | {"attention_bias": (None, False)}
_REMEDIES = {"quantization_config": QUANTISED}
_ROPE = ROPE | {"mrope_interleaved": (None, True)}


def check_stated(raw: Mapping[str, Any], kind: Kind, refuse: Refuse) -> None:
    """Refuse what config.json says and the model would not do, before transformers reads it.

    Args:
        raw: config.json.
        kind: of the model.
        refuse: Called with what is wrong; raises.
    """
    for block in ("text_config", "vision_config"):
        if not isinstance(raw.get(block), dict):
            refuse(f"{block} is missing; use the config.json of a {NAME} checkpoint")
    text, vision = raw["text_config"], raw["vision_config"]
    check_names(raw, kind.architecture, kind.model_type, refuse)
    for prefix, part, known, computed in (
        ("", raw, _TOP, _COMPUTED),
        (
            "text_config.",
            text,
            {*_TEXT, *kind.sizes, *kind.known},
            {**_COMPUTED, **kind.computed},
        ),
        ("vision_config.", vision, _VISION, VISION_COMPUTED),
    ):
        check_keys(prefix, part, known, computed, _REMEDIES, NAME, refuse)
    _check_rope(text, refuse)
    check_tower(vision, refuse)


def _check_rope(text: Mapping[str, Any], refuse: Refuse) -> None:
    """Interleaved mRoPE alone, without scaling, stated once or alike everywhere."""
    stated: dict[str, list[tuple[str, Any]]] = {
        "rope_theta": [("text_config.rope_theta", text.get("rope_theta"))],
        "mrope_section": [],
    }
    for key in ("rope_scaling", "rope_parameters"):
        name, rope = f"text_config.{key}", text.get(key)
        if rope is None:
            continue
        remedy = "only interleaved mrope without scaling is supported"
        check_rope_block(name, rope, _ROPE, remedy, refuse)
        for part, places in stated.items():
            places.append((f"{name}.{part}", rope.get(part)))
    for places in stated.values():
        check_equal([place for place in places if place[1] is not None], refuse)


def check_values(raw: Mapping[str, Any], hf: Config, kind: Kind, refuse: Refuse) -> None:
    """Refuse values that no model can have, and those that transformers has dropped.

    Args:
        raw: config.json.
        kind: of the model.
        hf: What transformers makes of it, its defaults filled in.
        refuse: Called with what is wrong; raises.
    """
    tied = raw["text_config"].get("tie_word_embeddings")
    # Files of models with experts have transformers' default there, which is wrong.
    if kind is DENSE and tied is not None and bool(tied) != bool(hf.tie_word_embeddings):
        refuse(
            f"text_config.tie_word_embeddings is {shown(tied)}, but what counts is "
            f"tie_word_embeddings at the top, {shown(hf.tie_word_embeddings)}; make them equal"
        )
    _check_text(hf.text_config, kind, refuse)
    _check_vision(hf.vision_config, hf.text_config, refuse)
    check_tokens(hf, _TOKENS, refuse)


def _check_text(text: Any, kind: Kind, refuse: Refuse) -> None:
    positive("text_config", text, (*_TEXT_SIZES, *kind.sizes), refuse)
    if kind is EXPERTS and not 1 < text.num_experts_per_tok <= text.num_experts:
        refuse(
            f"text_config.num_experts_per_tok is {text.num_experts_per_tok}; between 2 and "
            f"num_experts = {text.num_experts} is supported"
        )
    check_text_numbers(text, refuse)
    check_mrope_section(text, text.head_dim, refuse, interleaved=True)


def _check_vision(vision: Any, text: Any, refuse: Refuse) -> None:
    check_tower_sizes(vision, text, _VISION_SIZES, refuse)
    places = vision.num_position_embeddings
    if math.isqrt(places) ** 2 != places:
        refuse(
            f"vision_config.num_position_embeddings is {places}; a square number is needed, the "
            "places of a square grid"
        )
    deep = list(vision.deepstack_visual_indexes)
    inside = all(type(block) is int and 0 <= block < vision.depth for block in deep)
    if not inside or deep != sorted(set(deep)) or len(deep) > text.num_hidden_layers:
        refuse(
            f"vision_config.deepstack_visual_indexes is {shown(deep)}; increasing numbers of "
            f"blocks below depth = {vision.depth} are needed, at most as many as the language "
            f"model's {text.num_hidden_layers} layers"
        )
