"""Attention in two parts, merged by their log-sum-exp: with kernels that keep no score tensors.

Attention over keys A and B together is a weighted mean of attention over each: a part's weight is
its share of the sum of exponentials, exp(L_A) / (exp(L_A) + exp(L_B)) = sigmoid(L_A - L_B), where
L is the logarithm of that part's sum. Kernels that return L make the parts independent, so that
the queries of a group share one call over their prompt's keys.
"""

import torch

_SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_WIDEST = 256


def usable(query: torch.Tensor) -> bool:
    """Whether a query of this device, type and width goes by these kernels.

    On a CPU the last bits of decoding stay those of one softmax over all keys.
    """
    width = query.shape[-1]
    fits = width % 8 == 0 and width <= _WIDEST
    return query.device.type != "cpu" and query.dtype in _SIXTEEN_BITS and fits


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of all queries to all keys, and its log-sum-exp.

    Args:
        query: [B, heads, S, head_dim].
        key: [B, heads, T, head_dim]; value alike.
        scale: of the scores.
        bias: [T] is added to the scores; T is a multiple of 8 then, for the kernel's alignment.

    Returns:
        [B, heads, S, head_dim], and float32 [B, heads, S].
    """
    rows = query.shape[2]
    if bias is not None:
        bias = bias.expand(*query.shape[:3], -1)
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=scale
        )
    if bias is None:
        # It splits long keys over the GPU, which few queries alone would not fill.
        out, sums, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, scale=scale
        )
        return out, sums
    out, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, scale=scale
    )
    # This kernel's sums are padded.
    return out, sums[..., :rows]


def merged(
    one: torch.Tensor, one_sum: torch.Tensor, other: torch.Tensor, other_sum: torch.Tensor
) -> torch.Tensor:
    """Attention over both parts' keys, of outputs [..., head_dim] and their log-sum-exps [...]."""
    weight = torch.empty(one_sum.shape, dtype=one.dtype, device=one.device)
    torch.sigmoid(one_sum - other_sum, out=weight)
    # Kernels may give their outputs in another order of dimensions, which would be copied later.
    result = torch.empty(one.shape, dtype=one.dtype, device=one.device)
    return torch.lerp(other, one, weight[..., None], out=result)
