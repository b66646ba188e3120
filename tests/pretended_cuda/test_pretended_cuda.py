"""The pretended device refuses, allows and counts what CUDA would."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right


def outcomes(job):
    """Which of the mixtures are refused, by name."""
    there, here = torch.arange(6.0, device="cuda").view(2, 3), torch.arange(6.0).view(2, 3)
    number, index = torch.tensor(2.0), torch.tensor([0])
    mixtures = {
        "refused": {
            "product": lambda: there * here,
            "matrix product": lambda: there @ here.t(),
            "concatenation": lambda: torch.cat([there, here]),
            "where": lambda: torch.where(there > 1, there, here),
            "in place": lambda: here.add_(there),
            "number in place": lambda: number.add_(there[0, 0]),
            "index of the GPU": lambda: here[index.to("cuda")],
            "index_select": lambda: there.index_select(0, index),
            "set items": lambda: there.__setitem__((index,), here[:1]),
            "embedding": lambda: F.embedding(index, there),
            "numpy": lambda: there.numpy(),
            "pickle": lambda: pickle.dumps(there),
            "attention": lambda: F.scaled_dot_product_attention(
                there[None, None], here[None, None], here[None, None]
            ),
        },
        "allowed": {
            "number": lambda: there * number,
            "fill": lambda: there.masked_fill(there > 1, number),
            "index of the CPU": lambda: there[index],
            "copy": lambda: there.copy_(here),
        },
    }

    def is_refused(function):
        try:
            function()
        except (RuntimeError, TypeError):
            return True
        return False

    return {
        kind: {name: is_refused(function) for name, function in functions.items()}
        for kind, functions in mixtures.items()
    }


def test_mixed_devices_are_refused_as_on_cuda(on_pretended_gpu):
    (found,) = on_pretended_gpu(None, outcomes)
    assert [name for name, refused in found["refused"].items() if not refused] == []
    assert [name for name, refused in found["allowed"].items() if refused] == []


def counted(job):
    from cuda_counts import COUNTS

    from nemo_care.megatron.host_memory import host_empty

    def counts_of(function):
        COUNTS.clear()
        function()
        fields = (COUNTS.kernels, COUNTS.waits, COUNTS.uploads, COUNTS.float32_products)
        return tuple(sum(counter.values()) for counter in fields)

    x = torch.ones(4, 4, device="cuda")
    pinned = host_empty((4, 4), torch.float32)
    half = x.bfloat16()
    return {
        "view": counts_of(lambda: x.t()[1:]),
        "sum": counts_of(lambda: x.sum()),
        "item": counts_of(lambda: x[0, 0].item()),
        "mask": counts_of(lambda: x[x[0] > 0]),
        "upload": counts_of(lambda: torch.ones(3).to("cuda")),
        "pinned upload": counts_of(lambda: x.copy_(pinned)),
        "asynchronous": counts_of(lambda: pinned.copy_(x, non_blocking=True)),
        "download": counts_of(lambda: x.cpu()),
        "float32 product": counts_of(lambda: x @ x),
        "bf16 product": counts_of(lambda: torch.mm(half, half, out_dtype=torch.float32)),
    }


def test_kernels_waits_uploads_and_float32_products_are_counted(on_pretended_gpu):
    (found,) = on_pretended_gpu(None, counted)
    assert found == {
        "view": (0, 0, 0, 0),
        "sum": (1, 0, 0, 0),
        "item": (0, 1, 0, 0),
        "mask": (2, 1, 0, 0),
        "upload": (1, 0, 1, 0),
        "pinned upload": (1, 0, 0, 0),
        "asynchronous": (1, 0, 0, 0),
        "download": (1, 1, 0, 0),
        "float32 product": (1, 0, 0, 1),
        "bf16 product": (1, 0, 0, 0),
    }


def attended(dtype):
    """Attention and a norm with their gradients: exactly, on the CPU, and on the pretended GPU."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 5, 16), (2, 2, 9, 16), (2, 2, 9, 16))
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    weights = torch.randn(shapes[0], generator=generator)
    results = []
    for device, kind in (("cpu", torch.float32), ("cpu", dtype), ("cuda", dtype)):
        q, k, v = (x.to(device, kind, copy=True).requires_grad_() for x in drawn)
        mask = causal_lower_right(5, 9)
        if device == "cpu":
            mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = drawn[0].to(device, kind, copy=True).requires_grad_()
        norm = torch.nn.RMSNorm(16, eps=1e-6, device=device, dtype=kind)
        normed = norm(x)
        of = weights.to(device)
        ((out.float() + normed.float()) * of).sum().backward()
        found = (out, q.grad, k.grad, v.grad, normed, x.grad, norm.weight.grad)
        results.append([tensor.detach().float().cpu() for tensor in found])
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_that_the_cpu_lacks_compute_what_the_cpu_does(on_pretended_gpu, dtype):
    """In float32, and in bf16 with at most twice the rounding of the CPU's own kernels."""
    ((wanted, on_cpu, found),) = on_pretended_gpu(None, attended, dtype)
    for mine, cpu, exact in zip(found, on_cpu, wanted, strict=True):
        rounding = (cpu - exact).norm()
        assert (mine - exact).norm() <= 2 * rounding + 1e-5 * exact.norm()


def captured(job):
    total, place = torch.zeros(3, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = (total + 1) * 2
        total.index_add_(0, place, torch.ones(1, device="cuda"))
        place += 1
    seen = [total.tolist()]
    for _ in range(2):
        graph.replay()
        seen.append((total.tolist(), doubled.tolist()))
    refused = []
    for function in (lambda: bool(total.any()), lambda: total.copy_(torch.ones(3))):
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                function()
        except RuntimeError:
            refused.append(True)
    return seen, refused


def test_a_graph_repeats_what_it_captured(on_pretended_gpu):
    """What is captured is not done; waits and uploads are refused."""
    ((seen, refused),) = on_pretended_gpu(None, captured)
    assert seen == [[0, 0, 0], ([1, 0, 0], [2, 2, 2]), ([1, 1, 0], [4, 2, 2])]
    assert refused == [True, True]
