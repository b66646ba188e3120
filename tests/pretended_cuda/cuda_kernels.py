"""Operators that CUDA has kernels for and the CPU has not, computed by torch on the CPU."""

from typing import Any

import torch

aten = torch.ops.aten


def _flash_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The flash kernel; its causal mask ends at the last key for the last query."""
    assert dropout_p == 0.0
    assert not return_debug_mask
    scores, value = _scores(query, key, value, is_causal, scale)[::2]
    sums = scores.logsumexp(-1)
    out = (scores - sums[..., None]).exp() @ value
    nothing = torch.zeros((), dtype=torch.long)
    sizes = query.shape[2], key.shape[2]
    # The kernel works on [B, S, heads, head_dim], and gives a view of that.
    out = out.to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    return out, sums, None, None, *sizes, nothing, nothing, query.new_empty(0)


def _flash_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    *others: Any,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    is_causal = others[5]
    scores, keys, values = _scores(query, key, value, is_causal, scale)
    weights = (scores - sums[..., None]).exp()
    grad = gradient.float()
    grad_weights = grad @ values.transpose(2, 3)
    grad_scores = weights * (grad_weights - (grad * out.float()).sum(-1, keepdim=True))
    grad_scores = grad_scores * _scale(query, scale)
    heads = (key.shape[1], query.shape[1] // key.shape[1])
    parts = (grad_scores.transpose(2, 3) @ query.float(), weights.transpose(2, 3) @ grad)
    grad_key, grad_value = (part.unflatten(1, heads).sum(2).to(key.dtype) for part in parts)
    return (grad_scores @ keys).to(query.dtype), grad_key, grad_value


def _efficient_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, ...]:
    """The memory-efficient kernel, without gradients; its sums are padded to 32 rows."""
    assert compute_log_sumexp
    assert dropout_p == 0.0
    assert not is_causal
    scores, value = _scores(query, key, value, is_causal, scale)[::2]
    if bias is not None:
        # Loads of the kernel are aligned to 16 bytes.
        assert bias.shape[-1] % 8 == 0
        scores = scores + bias.float()
    sums = scores.logsumexp(-1)
    out = ((scores - sums[..., None]).exp() @ value).to(query.dtype)
    sums = torch.nn.functional.pad(sums, (0, -sums.shape[-1] % 32), value=float("inf"))
    nothing = torch.zeros((), dtype=torch.long)
    return out.transpose(1, 2).contiguous().transpose(1, 2), sums, nothing, nothing


def _scale(query: torch.Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, keys and values in float32, of as many heads as the queries have."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = query.float() @ key.transpose(2, 3) * _scale(query, scale)
    if is_causal:
        rows, columns = scores.shape[-2:]
        seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores, key, value


def _rms_norm_forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
    return (x.float() * scale * weight.float()).to(x.dtype), scale


def _rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    normed, grad = x.float() * scale, gradient.float()
    grad_weight = (grad * normed).flatten(0, -2).sum(0)
    grad = grad * weight.float()
    grad_x = scale * (grad - normed * (grad * normed).mean(-1, keepdim=True))
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


# torch's own operator is fused in builds with CUDA only, and consists of others elsewhere.
_library = torch.library.Library("pretended", "DEF")
_library.define("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)")
_library.define(
    "rms_norm_backward(Tensor gradient, Tensor x, Tensor scale, Tensor weight) -> (Tensor, Tensor)"
)
_library.impl("rms_norm", _rms_norm_forward, "CPU")
_library.impl("rms_norm_backward", _rms_norm_backward, "CPU")


class FusedRMSNorm(torch.autograd.Function):
    """The norm as one kernel, as on CUDA."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        normed, scale = torch.ops.pretended.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return normed

    @staticmethod
    def backward(ctx, gradient):
        return *torch.ops.pretended.rms_norm_backward(gradient, *ctx.saved_tensors), None


def _wide(product: Any) -> Any:
    """A product of 16-bit matrices that is not rounded to 16 bits."""
    return lambda a, b, out_dtype: product(a.to(out_dtype), b.to(out_dtype))


KERNELS = {
    aten.mm.dtype: _wide(torch.mm),
    aten.bmm.dtype: _wide(torch.bmm),
    aten._scaled_dot_product_flash_attention.default: _flash_forward,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten._scaled_dot_product_efficient_attention.default: _efficient_forward,
}
