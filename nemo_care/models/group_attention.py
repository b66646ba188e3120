"""Attention of the layer spec: over whole sequences, and over groups that share their prompt.

In a packed sequence (see `segments.py`) every segment attends to its context and causally to
itself. The result and all gradients equal those of separate sequences. A masked attention over the
whole packed sequence would compute all pairs of completions only to throw them away. The kernels'
inputs contain a prompt's keys and values once per completion; backward keeps these copies unless
`model.recompute_granularity` is selective or full.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch.nn.attention.bias import causal_lower_right

from nemo_care.models.decoding_cache import DecodingCache, PromptPass
from nemo_care.models.segments import Bucket, PackedSegments


class GroupAttention(torch.nn.Module):
    """`core_attention` with torch's scaled-dot-product kernels, on CPU and GPU.

    Megatron's stock core attention builds the full score matrix and has no notion of groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        """Arguments are those with which Megatron builds any core attention."""
        super().__init__()
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: PackedSegments | DecodingCache | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [S, B, heads, head_dim], with rotary embedding, unless it is in the cache.
            key: [S, B, key-value heads, head_dim], as the query; value alike.
            attention_mask: not used: what a token sees follows from `packed_seq_params`.
            packed_seq_params: None: B sequences, each causal. Else B = 1: segments of a packed
                sequence; or a cache, in which `key` and `value` are stored and read back.

        Returns:
            [S, B, heads * head_dim]; zero at the padding of a packed sequence.
        """
        if isinstance(packed_seq_params, DecodingCache):
            cache = packed_seq_params
            return cache.attend(self.layer_number, query, key, value, self.softmax_scale)
        if isinstance(packed_seq_params, PromptPass):
            query, key = packed_seq_params.rotate_and_store(self.layer_number, query, key, value)
        if packed_seq_params is not None:
            return self._attend_segments(query, key, value, packed_seq_params)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attend_segments(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedSegments
    ) -> torch.Tensor:
        """One kernel call per bucket of segments that share context and, about, length."""
        _, batch, heads, width = query.shape
        if batch != 1:
            raise ValueError(f"a packed sequence stands alone, not in a batch of {batch}")
        q, k, v = query[:, 0], key[:, 0], value[:, 0]
        outputs = []
        for bucket in packed.buckets:
            rows = q.index_select(0, bucket.tokens)
            rows = rows.view(bucket.count, bucket.length, heads, width).transpose(1, 2)
            keys, values = (_with_context(x, bucket) for x in (k, v))
            out = F.scaled_dot_product_attention(
                rows,
                keys,
                values,
                # Padding follows a segment's own tokens, where the mask hides it.
                attn_mask=causal_lower_right(bucket.length, keys.shape[2]),
                scale=self.softmax_scale,
                enable_gqa=heads != keys.shape[1],
            )
            outputs.append(out.transpose(1, 2).reshape(-1, heads * width))
        outputs.append(q.new_zeros(1, heads * width))
        return torch.cat(outputs).index_select(0, packed.places)[:, None]


def _with_context(x: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    """Keys or values [S, heads, head_dim] of a bucket: [n, heads, context + L, head_dim]."""
    own = x.index_select(0, bucket.tokens).view(bucket.count, bucket.length, *x.shape[1:])
    context = [x[start:stop].expand(bucket.count, -1, -1, -1) for start, stop in bucket.context]
    return torch.cat([*context, own], dim=1).transpose(1, 2)
