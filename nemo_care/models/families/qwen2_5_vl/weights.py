"""Which tensors of a Qwen2.5-VL checkpoint fill which of Megatron's parameters."""

from nemo_care.models.families.decoder_weights import DECODER_LAYER
from nemo_care.models.weight_table import EMBEDDING, OUTPUT, Source, WeightTable


def disk_name(name: str) -> str:
    """A tensor's name on disk in the published checkpoints.

    transformers' modules, and so some of its releases' files, have longer ones.
    """
    name = name.replace("model.language_model.", "model.", 1)
    return name.replace("model.visual.", "visual.", 1)


WEIGHTS = WeightTable(
    layer={
        **DECODER_LAYER,
        "self_attention.linear_qkv.bias": Source(
            ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), "qkv"
        ),
    },
    layer_prefix="model.layers.{}.",
    outer={
        EMBEDDING: Source(("model.embed_tokens.weight",), "vocabulary"),
        "decoder.final_layernorm.weight": Source(("model.norm.weight",), "whole"),
        OUTPUT: Source(("lm_head.weight",), "vocabulary"),
    },
    vision_prefix="visual.",
    disk_name=disk_name,
    mergers=("merger.",),
    # Older releases saved them.
    recomputed=("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq"),
)
