"""Megatron's configuration of a language model, and the check of its layout."""

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from nemo_care.errors import InputError
from nemo_care.models.architecture import Architecture
from nemo_care.models.family import Family
from nemo_care.models.precision import check_fp8, fp8_arguments
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.model import FP8Config


def check_layout(model: Architecture, layout: Layout) -> None:
    """Refuse a layout that does not divide the model.

    Raises:
        InputError: names the key and the values that fit.
    """
    heads, groups, layers = model.heads, model.kv_heads, model.layers
    _check_experts(model, layout)

    def fits(size: int) -> bool:
        cut = [heads, groups, model.hidden_size]
        if model.experts is None:
            cut.append(model.ffn_size)
        return not any(width % size for width in cut)

    if not fits(layout.tensor):
        good = [str(size) for size in range(1, groups + 1) if fits(size)]
        raise InputError(
            f"model.tensor_model_parallel_size={layout.tensor} does not divide the model's "
            f"{heads} attention heads and {groups} key-value heads: use {', '.join(good)}"
        )
    if layers % layout.pipeline:
        good = [str(size) for size in range(1, layers + 1) if layers % size == 0]
        raise InputError(
            f"model.pipeline_model_parallel_size={layout.pipeline} does not divide the model's "
            f"{layers} layers: use {', '.join(good)}"
        )
    if layers // layout.pipeline < model.deep_levels:
        raise InputError(
            f"model.pipeline_model_parallel_size={layout.pipeline} leaves {layers} / "
            f"{layout.pipeline} layers to the first stage, but the vision tower's features are "
            f"added after each of the first {model.deep_levels} layers: use "
            f"{layers // model.deep_levels} or less"
        )


def _check_experts(model: Architecture, layout: Layout) -> None:
    """Refuse a layout that does not divide the experts, or that Megatron can't train them in."""
    if model.experts is None:
        if layout.expert > 1 or layout.expert_tensor_size != layout.tensor:
            raise InputError(
                f"model.expert_model_parallel_size={layout.expert}: this model has no experts; "
                "remove model.expert_model_parallel_size and model.expert_tensor_parallel_size"
            )
        return
    count = model.experts.count
    if count % layout.expert:
        good = [str(size) for size in range(1, count + 1) if count % size == 0]
        raise InputError(
            f"model.expert_model_parallel_size={layout.expert} does not divide the model's {count} "
            f"experts: use {', '.join(good)}"
        )
    if model.ffn_size % layout.expert_tensor_size:
        raise InputError(
            f"model.expert_tensor_parallel_size={layout.expert_tensor_size} does not divide the "
            f"experts' intermediate size {model.ffn_size}"
        )
    if layout.tensor > 1 and not layout.sequence_parallel:
        raise InputError(
            f"model.tensor_model_parallel_size={layout.tensor}: a model with experts is trained "
            "with sequence parallelism only; set model.sequence_parallel=true"
        )


def _gradients_can_be_fused() -> bool:
    """Whether linear layers can add gradients to the float32 sums within the matrix product.

    TransformerEngine's layers could without this extension of apex, but Megatron's own output layer
    requires it.
    """
    return torch.cuda.is_available() and find_spec("fused_weight_gradient_mlp_cuda") is not None


def _expert_arguments(model: Architecture, layout: Layout) -> dict[str, Any]:
    """Return arguments for a model whose layers have experts; none otherwise."""
    if model.experts is None:
        return {}
    return {
        "num_moe_experts": model.experts.count,
        "moe_router_topk": model.experts.active,
        "moe_ffn_hidden_size": model.ffn_size,
        # The weights of a token's experts are the softmax over their logits alone.
        "moe_router_pre_softmax": False,
        "moe_router_dtype": "fp32",
        # Rewards alone shape the router: an auxiliary loss would be a second objective.
        "moe_router_load_balancing_type": "none",
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor_size,
    }


def transformer_config(
    family: Family,
    layout: Layout,
    dtype: torch.dtype,
    recompute_granularity: str = "none",
    fp8: FP8Config | None = None,
) -> TransformerConfig:
    """Return Megatron's configuration of a family's language model.

    `recompute_granularity`: none, selective (the inside of attention) or full (whole layers).
    `fp8`: how the layers compute in 8 bits; None disables it.

    Raises:
        InputError: the model or the layout does not fit 8-bit products.
    """
    model = family.architecture
    if fp8 is not None:
        check_fp8(fp8, model, layout)
    recompute: dict[str, Any] = {}
    if recompute_granularity != "none":
        recompute["recompute_granularity"] = recompute_granularity
    if recompute_granularity == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        sequence_parallel=layout.sequence_parallel and layout.tensor > 1,
        # Micro-batches differ in length: with this, stages exchange their shapes. Megatron then
        # requires the all-to-all dispatcher, even without experts.
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=not torch.cuda.is_available(),
        # All weights come from a checkpoint.
        perform_initialization=False,
        gradient_accumulation_fusion=_gradients_can_be_fused(),
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **_expert_arguments(model, layout),
        **family.megatron_settings(),
        **recompute,
        **fp8_arguments(fp8, recompute_granularity),
    )
