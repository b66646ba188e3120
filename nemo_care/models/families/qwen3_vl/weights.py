"""Which tensors of a Qwen3-VL checkpoint fill which of Megatron's parameters."""

from nemo_care.models.families.decoder_weights import DECODER_LAYER
from nemo_care.models.weight_table import EMBEDDING, OUTPUT, Source, WeightTable

WEIGHTS = WeightTable(
    layer={
        **DECODER_LAYER,
        "self_attention.q_layernorm.weight": Source(("self_attn.q_norm.weight",), "whole"),
        "self_attention.k_layernorm.weight": Source(("self_attn.k_norm.weight",), "whole"),
    },
    layer_prefix="model.language_model.layers.{}.",
    outer={
        EMBEDDING: Source(("model.language_model.embed_tokens.weight",), "vocabulary"),
        "decoder.final_layernorm.weight": Source(("model.language_model.norm.weight",), "whole"),
        OUTPUT: Source(("lm_head.weight",), "vocabulary"),
    },
    vision_prefix="model.visual.",
    # Published files have the names of transformers' modules.
    disk_name=lambda name: name,
)
