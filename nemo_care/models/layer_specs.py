"""Which modules a transformer layer is made of: the seam between kernels and model.

`local` runs everywhere: Megatron's parallel linear layers, torch's norms and attention.
`transformer_engine` is Megatron's own spec for TransformerEngine (norms fused into the linear
layers after them, 8-bit products) with its variable-length kernels for packed groups.
`tests/models/test_te_layers.py` compares it with `local`, with a stand-in for TransformerEngine.
Both store the same tensors: the norms' weights are called `input_layernorm.weight` and
`pre_mlp_layernorm.weight`, or `layer_norm_weight` of the linear layer after them.
"""

from typing import Any

import torch
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from nemo_care.megatron.experts import route_without_transformer_engine
from nemo_care.megatron.te_import import why_unusable
from nemo_care.models.group_attention import GroupAttention
from nemo_care.models.precision import missing_transformer_engine
from nemo_care.models.te_attention import TransformerEngineGroupAttention


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight takes part in the gradient sum of sequence parallelism."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **unused: Any
    ) -> None:
        """Arguments are those with which Megatron builds any norm."""
        super().__init__(
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        # Every rank sees only its part of the sequence, so Megatron must sum this gradient over
        # the tensor-parallel ranks; it looks for this mark.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def _local(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    route_without_transformer_engine()
    layer = gpt_layer_specs.get_gpt_layer_local_spec(
        # Experts are computed one after another.
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        normalization="RMSNorm",
    )
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = GroupAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer, RMSNorm


def _transformer_engine(config: TransformerConfig) -> tuple[ModuleSpec, type]:
    try:
        import transformer_engine.pytorch  # noqa: F401
        from megatron.core.extensions.transformer_engine import TENorm
    except ImportError as error:
        raise missing_transformer_engine(why_unusable() or error) from error
    # A rank's experts are computed by one grouped product.
    config.moe_grouped_gemm = config.num_moe_experts is not None
    layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    layer.submodules.self_attention.submodules.core_attention = TransformerEngineGroupAttention
    # A norm before experts is not fused; in checkpoints it has the name that `local` gives it.
    layer.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] = (
        "mlp.linear_fc1.layer_norm_"
    )
    return layer, TENorm


# "auto" is local everywhere, because transformer_engine has not been run on a GPU yet.
_BACKENDS = {"auto": _local, "local": _local, "transformer_engine": _transformer_engine}


def layer_spec(config: TransformerConfig, backend: str) -> TransformerBlockSubmodules:
    """Return the layers of this pipeline stage for a backend.

    Raises:
        InputError: the backend can't be imported here.
    """
    layer, norm = _BACKENDS[backend](config)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=norm
    )
