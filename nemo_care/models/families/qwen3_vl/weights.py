"""Which tensors of a Qwen3-VL checkpoint fill which of Megatron's parameters."""

from nemo_care.models.weight_table import EMBEDDING, OUTPUT, Source, WeightTable

_INPUT_NORM = Source(("input_layernorm.weight",), "whole")
_MLP_NORM = Source(("post_attention_layernorm.weight",), "whole")

WEIGHTS = WeightTable(
    layer={
        # A norm is a module of its own (local) or part of the layer that follows it
        # (transformer_engine).
        "input_layernorm.weight": _INPUT_NORM,
        "self_attention.linear_qkv.layer_norm_weight": _INPUT_NORM,
        "pre_mlp_layernorm.weight": _MLP_NORM,
        "mlp.linear_fc1.layer_norm_weight": _MLP_NORM,
        "self_attention.linear_qkv.weight": Source(
            ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
            "qkv",
        ),
        "self_attention.q_layernorm.weight": Source(("self_attn.q_norm.weight",), "whole"),
        "self_attention.k_layernorm.weight": Source(("self_attn.k_norm.weight",), "whole"),
        "self_attention.linear_proj.weight": Source(("self_attn.o_proj.weight",), "columns"),
        "mlp.linear_fc1.weight": Source(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"),
        "mlp.linear_fc2.weight": Source(("mlp.down_proj.weight",), "columns"),
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
    mergers=("merger.", "deepstack_merger_list."),
)
