"""Which tensors of a Qwen2.5-VL checkpoint fill which of Megatron's parameters."""

from nemo_care.models.weight_table import EMBEDDING, OUTPUT, Source, WeightTable

_INPUT_NORM = Source(("input_layernorm.weight",), "whole")
_MLP_NORM = Source(("post_attention_layernorm.weight",), "whole")


def disk_name(name: str) -> str:
    """A tensor's name on disk in the published checkpoints.

    transformers' modules, and so some of its releases' files, have longer ones.
    """
    name = name.replace("model.language_model.", "model.", 1)
    return name.replace("model.visual.", "visual.", 1)


WEIGHTS = WeightTable(
    layer={
        # A norm is a module of its own (local) or part of the layer behind it
        # (transformer_engine).
        "input_layernorm.weight": _INPUT_NORM,
        "self_attention.linear_qkv.layer_norm_weight": _INPUT_NORM,
        "pre_mlp_layernorm.weight": _MLP_NORM,
        "mlp.linear_fc1.layer_norm_weight": _MLP_NORM,
        "self_attention.linear_qkv.weight": Source(
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            "qkv",
        ),
        "self_attention.linear_qkv.bias": Source(
            ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), "qkv"
        ),
        "self_attention.linear_proj.weight": Source(("self_attn.o_proj.weight",), "columns"),
        "mlp.linear_fc1.weight": Source(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"),
        "mlp.linear_fc2.weight": Source(("mlp.down_proj.weight",), "columns"),
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
