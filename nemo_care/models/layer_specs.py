"""Which modules a transformer layer is made of: the seam between kernels and model.

Both backends use plain torch modules under Megatron's parallel linear layers; they differ in the
attention of packed groups: torch's (`local`, runs everywhere) or TransformerEngine's kernels.
"""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from nemo_care.errors import InputError
from nemo_care.models.group_attention import GroupAttention
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


def _spec(
    config: TransformerConfig, core_attention: type[GroupAttention]
) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = RMSNorm
    parts.pre_mlp_layernorm = RMSNorm
    parts.self_attention.submodules.core_attention = core_attention
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=RMSNorm
    )


_BACKENDS = {"local": GroupAttention, "transformer_engine": TransformerEngineGroupAttention}


def layer_spec(config: TransformerConfig, backend: str = "auto") -> TransformerBlockSubmodules:
    """The layers of this pipeline stage for a backend ("auto" is local).

    Raises:
        InputError: an unknown backend.
    """
    name = "local" if backend == "auto" else backend
    if name not in _BACKENDS:
        raise InputError(f"model.backend={backend}: choose auto or {', '.join(_BACKENDS)}")
    return _spec(config, _BACKENDS[name])
