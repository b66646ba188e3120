"""Attention over whole sequences with torch's scaled-dot-product kernels."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig


class SDPACoreAttention(torch.nn.Module):
    """`core_attention` of the local layer spec.

    Megatron's stock core attention builds the full score matrix; this one calls the fused kernel,
    which also runs on a CPU, and understands grouped queries without repeating the keys.
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
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **unused: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [S_q, B, heads, head_dim].
            key: [S_k, B, key-value heads, head_dim]; value alike.
            attention_mask: [B or 1, 1, S_q, S_k], True where a query may look (the opposite of
                Megatron's own masks). None: causal when S_q equals S_k, else every key, which is
                right for one new token against a cache.

        Returns:
            [S_q, B, heads * head_dim].
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=attention_mask is None and q.shape[2] == k.shape[2],
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(2)
