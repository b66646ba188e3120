"""Which tensors of a Qwen3-VL checkpoint fill which of Megatron's parameters."""

from dataclasses import replace

from nemo_care.models.families.decoder_weights import DECODER_LAYER
from nemo_care.models.weight_table import EMBEDDING, OUTPUT, Source, WeightTable

_DENSE_MLP = ("mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight")

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
    mergers=("merger.", "deepstack_merger_list."),
)

# The experts of a layer are one tensor each for their two matrices.
EXPERT_WEIGHTS = replace(
    WEIGHTS,
    layer={
        **{name: source for name, source in WEIGHTS.layer.items() if name not in _DENSE_MLP},
        "mlp.router.weight": Source(("mlp.gate.weight",), "whole"),
        "mlp.experts.linear_fc1.weight": Source(
            ("mlp.experts.gate_up_proj",),
            "gate_up",
            ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        ),
        "mlp.experts.linear_fc2.weight": Source(
            ("mlp.experts.down_proj",), "columns", ("mlp.experts.{}.down_proj.weight",)
        ),
    },
    experts=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
)
