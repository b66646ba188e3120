"""GroupAttention with TransformerEngine's variable-length kernels, for GPUs.

All segments of a packed sequence are the rows of one kernel call, none of them padded. The keys of
a context are gathered once per segment that attends to it. Not yet run on a GPU: the tests in
`tests/models/test_te_attention.py` check the kernel's inputs with a kernel written in torch.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from nemo_care.megatron.te_import import why_unusable
from nemo_care.models.group_attention import GroupAttention
from nemo_care.models.precision import missing_transformer_engine
from nemo_care.models.segments import PackedSegments


class TransformerEngineGroupAttention(GroupAttention):
    """Packed sequences with TransformerEngine ("thd", causal from the bottom right).

    Separate sequences and decoding use torch's kernels.
    """

    kernel: Any

    def __init__(self, config: TransformerConfig, layer_number: int, **arguments: Any) -> None:
        """Raises InputError if TransformerEngine can't be imported."""
        super().__init__(config, layer_number, **arguments)
        try:
            from transformer_engine.pytorch import DotProductAttention
        except ImportError as error:
            raise missing_transformer_engine(why_unusable() or error) from error
        # The number of heads on this rank; TransformerEngine treats them as all there are.
        ranks = config.tensor_model_parallel_size
        kernel = DotProductAttention(
            num_attention_heads=config.num_attention_heads // ranks,
            kv_channels=config.kv_channels,
            num_gqa_groups=config.num_query_groups // ranks,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            # A completion has more keys than queries, because it includes its prompt's. With
            # "self", the unfused backend masks keys by the queries' lengths.
            attention_type="cross",
            layer_number=layer_number,
            softmax_scale=self.softmax_scale,
        )
        # Not a submodule, whose extra state would make checkpoints differ from those of `local`.
        object.__setattr__(self, "kernel", kernel)

    def _attend_segments(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSegments
    ) -> torch.Tensor:
        rows = packed.variable_lengths
        out = self.kernel(
            query[: packed.used, 0],
            key[:, 0].index_select(0, rows.keys),
            value[:, 0].index_select(0, rows.keys),
            cu_seqlens_q=rows.query_starts,
            cu_seqlens_kv=rows.key_starts,
            max_seqlen_q=rows.longest_query,
            max_seqlen_kv=rows.longest_key,
        )
        out = out.reshape(packed.used, -1)
        return torch.nn.functional.pad(out, (0, 0, 0, packed.length - packed.used))[:, None]
