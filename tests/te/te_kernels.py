"""The kernels that training with TransformerEngine's layers calls in bf16 and fp32, in torch."""

import te_python_half
import torch


def _dtype(given) -> torch.dtype | None:
    """torch's name of a dtype of the extension."""
    if given is None or isinstance(given, torch.dtype):
        return given
    name = te_python_half.name_of_dtype(given)
    return {"Float32": torch.float32, "Float16": torch.float16, "BFloat16": torch.bfloat16}[name]


def generic_gemm(a, transposed_a, b, transposed_b, out, quantizer, out_dtype, bias, bias_dtype,
                 gelu, gelu_in, grad, workspace, size, accumulate, split, comm_overlap=None,
                 comm_type=None, extra_output=None, bulk_overlap=False, alpha=1.0,
                 beta=0.0):  # fmt: skip
    """BLAS's order: columns first, so that A is the weight and the product is B A^T."""
    assert [gelu, comm_overlap, quantizer] == [False, None, None]
    left, right = b.reshape(-1, b.shape[-1]), a.reshape(-1, a.shape[-1])
    left, right = (left.t() if transposed_b else left), (right.t() if transposed_a else right)
    product = left.float() @ right.float() * alpha
    has_bias = bias is not None and bias.numel() > 0
    bias_gradient = None
    if grad and has_bias:
        bias_gradient = b.reshape(-1, b.shape[-1]).float().sum(0).to(bias.dtype)
    elif has_bias:
        product = product + bias.float()
    shape = product.shape if transposed_b else (*b.shape[:-1], product.shape[-1])
    if out is None:
        out = product.to(_dtype(out_dtype) or a.dtype).reshape(shape)
    elif accumulate:
        out.add_(product.to(out.dtype).reshape(out.shape))
    else:
        out.copy_(product.reshape(out.shape))
    return [out, bias_gradient, None, None]


def te_general_grouped_gemm(a, transposed_a, b, transposed_b, out, out_dtype, rows, bias,
                            bias_dtype, single_output, gelu_in, grad, workspaces, size, accumulate,
                            *rest):  # fmt: skip
    """One product per expert; some have no rows."""
    places = out[0].split(rows) if single_output else out
    for left, right, place in zip(a, b, places, strict=True):
        generic_gemm(left, transposed_a, right, transposed_b, place, None, out_dtype, None, None,
                     False, None, grad, None, 0, accumulate, False)  # fmt: skip
    return bias


def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, margin, zero_centered):
    assert quantizer is None
    assert not zero_centered
    scale = torch.rsqrt(x.float().square().mean(-1) + eps)
    normed = (x.float() * scale[..., None] * weight.float()).to(_dtype(dtype))
    if out is not None:
        out.copy_(normed.reshape(out.shape))
        normed = out
    return [normed, None, scale.reshape(-1)]


def rmsnorm_bwd(dy, x, scale, weight, margin, zero_centered):
    width = x.shape[-1]
    rows, upstream = x.reshape(-1, width).float(), dy.reshape(-1, width).float()
    scale = scale.reshape(-1, 1)
    normed, through = rows * scale, upstream * weight.float()
    dx = scale * (through - normed * (through * normed).mean(-1, keepdim=True))
    return [dx.to(x.dtype).reshape(x.shape), (upstream * normed).sum(0).to(weight.dtype)]


def multi_tensor_adam(chunk, noop, lists, lr, beta1, beta2, eps, step, mode, bias_correction,
                      decay, *rest):  # fmt: skip
    """The extension declares `step` as an int, and takes no other number."""
    assert isinstance(step, int)
    first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1, 1)
    for gradient, weight, mean, square in zip(*lists[:4], strict=True):
        mean.mul_(beta1).add_(gradient.float(), alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient.float(), gradient.float(), value=1 - beta2)
        move = (mean / first) / ((square / second).sqrt() + eps)
        weight.sub_(lr * (move + decay * weight))


def multi_tensor_l2norm(chunk, noop, lists, per_tensor):
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]])
    return norms.norm().reshape(1), norms


def multi_tensor_scale(chunk, noop, lists, factor):
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def convert_thd_to_bshd(x, starts, batch, longest):
    out = x.new_zeros(batch, longest, *x.shape[1:])
    for row in range(batch):
        part = x[starts[row] : starts[row + 1]]
        out[row, : len(part)] = part
    return out


def convert_bshd_to_thd(x, starts, total):
    out = x.new_zeros(total, *x.shape[2:])
    for row in range(len(starts) - 1):
        out[starts[row] : starts[row + 1]] = x[row, : starts[row + 1] - starts[row]]
    return out


def get_fused_attn_backend(*arguments, **keywords):
    """cuDNN has none: the unfused backend, written in torch, is left."""
    return te_python_half.no_fused_attention()


te_python_half.FUNCTIONS.update(
    {name: function for name, function in list(globals().items()) if callable(function)}
)
