"""The tensors of a language model's layer under the names that most checkpoints have."""

from nemo_care.models.weight_table import Source

_INPUT_NORM = Source(("input_layernorm.weight",), "whole")
_MLP_NORM = Source(("post_attention_layernorm.weight",), "whole")

# Of `WeightTable.layer`: a family adds its own, and may take some away.
DECODER_LAYER = {
    # A norm is a module of its own (local) or part of the layer after it (transformer_engine).
    "input_layernorm.weight": _INPUT_NORM,
    "self_attention.linear_qkv.layer_norm_weight": _INPUT_NORM,
    "pre_mlp_layernorm.weight": _MLP_NORM,
    "mlp.linear_fc1.layer_norm_weight": _MLP_NORM,
    "self_attention.linear_qkv.weight": Source(
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), "qkv"
    ),
    "self_attention.linear_proj.weight": Source(("self_attn.o_proj.weight",), "columns"),
    "mlp.linear_fc1.weight": Source(("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"),
    "mlp.linear_fc2.weight": Source(("mlp.down_proj.weight",), "columns"),
}
