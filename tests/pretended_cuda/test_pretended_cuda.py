"""The pretended device does as CUDA would; what a training step does on it, by phase.

The bounds of kernels, waits, uploads and float32 products are what there is. A change that makes
the CPU wait once more per token or micro-batch, or launches one more kernel per layer and token,
fails here; one that needs fewer lowers the bound.
"""

import copy
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from small_runs import small_recipe, small_trainer
from torch.nn.attention.bias import causal_lower_right

from nemo_care.models.decoding_cache import DecodingCache
from nemo_care.planning.work import Efficiency
from nemo_care.ranks.process_groups import Layout
from nemo_care.rollouts.fixed_decoding import LOOK_EVERY
from nemo_care.training.step import Step

# Of one forward pass of the vision tower: transformers reads the grids back, and indexes with
# windows that it has sorted on the CPU.
VISION_WAITS = 9
# Of one batch or micro-batch: token ids, positions, segments, frames and windows.
BATCH_UPLOADS = 20
MICRO_BATCHES = 4
ROLLOUT_BATCHES = 2


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


# ------------------------------------------------------------------ a training step


def total(counter: Counter) -> int:
    return sum(counter.values())


def second_step(ranks, job):
    """Train two steps; what the second one's phases do, and the kernels of a layer for a token."""
    from cuda_counts import COUNTS

    trainer = small_trainer(job["recipe"], ranks, job["folder"])
    layers, before = [], {}
    layer = trainer.policy.model.language_model.decoder.layers[0]

    def begin(module, args, kwargs):
        before["kernels"] = copy.copy(COUNTS.kernels)

    def end(module, args, kwargs, output):
        cache = kwargs["packed_seq_params"]
        if isinstance(cache, DecodingCache):
            layers.append((len(cache._lengths), COUNTS.kernels - before["kernels"]))

    layer.register_forward_pre_hook(begin, with_kwargs=True)
    layer.register_forward_hook(end, with_kwargs=True)
    for number in (1, 2):
        layers.clear()
        phases, names = {}, []

        def shown(name, phases=phases, names=names):
            if names:
                phases[names[-1]] = copy.deepcopy(COUNTS)
            names.append(name)
            COUNTS.clear()

        trainer.step = number
        step = Step(number, shown=shown)
        trainer.run_training_step(step)
        shown("end")
    return {
        "phases": phases,
        "layers": layers,
        "bad": step.metrics["train/bad_step"],
        "lengths": [[c.length for c in group.completions] for group in step.groups],
        "parameters": len(list(trainer.policy.model.parameters())),
    }


@pytest.fixture(scope="module", params=[False, True], ids=["default", "cuda_graphs"])
def step(request, on_pretended_gpu, checkpoint, world, tmp_path_factory):
    recipe = small_recipe(checkpoint, world)
    recipe.model.precision.dtype = "bf16"
    recipe.optimizer.offload = recipe.algorithm.reference.offload = True
    recipe.rollout.cuda_graphs = request.param
    recipe.rollout.groups_per_batch = 3
    # The tiny model is not accurate in bf16.
    recipe.rollout.max_logprob_difference = 1.0
    recipe.algorithm.reference.max_logprob_difference = 1.0
    job = {"recipe": recipe, "folder": tmp_path_factory.mktemp("run")}
    (found,) = on_pretended_gpu(Layout(), second_step, job)
    assert found["bad"] == 0
    return {**found, "graphs": request.param, "max_tokens": recipe.rollout.max_completion_tokens}


def test_a_layer_takes_few_kernels_for_a_token(step):
    """24 for one group, which the plan counts with."""
    calls = {}
    for prompts, kernels in step["layers"]:
        calls.setdefault(prompts, []).append((total(kernels), kernels))
    assert pytest.approx(Efficiency().layer_microseconds, rel=0.05) == 12 * 24
    for prompts in calls:
        # Several groups have a kernel each for their prompts, and are joined and sorted.
        bound = 24 if prompts == 1 else 24 + 3 + prompts
        counts = [count for count, _ in calls[prompts]]
        # A few more once some completions have ended, and for the cache in the first call.
        assert max(counts) <= bound + 4, calls[prompts]
    # All three prompts of the first batch, and the one of the second, begin without ended ones.
    for prompts, bound in ((1, 24), (3, 30)):
        assert min(count for count, _ in calls[prompts]) <= bound, calls[prompts]


def test_between_looks_at_the_end_a_rollout_does_not_wait(step):
    waits = step["phases"]["rollout"].waits
    per_batch = VISION_WAITS + 2  # tokens and log-probabilities at its end
    if step["graphs"]:
        looks = (step["max_tokens"] - 1) // LOOK_EVERY
        assert total(waits) <= ROLLOUT_BATCHES * (per_batch + looks) + 1, waits
        return
    batches = [step["lengths"][:3], step["lengths"][3:]]
    tokens = sum(max(map(max, lengths)) for lengths in batches)
    # Whenever completions have ended, the cache finds out whether all of a prompt have.
    ends = sum(len({n for row in lengths for n in row}) for lengths in batches)
    assert total(waits) <= ROLLOUT_BATCHES * per_batch + tokens + 2 * ends + 1, waits


def test_scoring_and_update_wait_per_micro_batch_only(step):
    scoring, update = (step["phases"][name].waits for name in ("scoring", "update"))
    assert total(scoring) <= MICRO_BATCHES * (VISION_WAITS + 6) + 3, scoring
    # Megatron's norm without fused kernels reads each parameter's, and an offloaded average is
    # written back parameter by parameter.
    assert total(update) <= MICRO_BATCHES * (VISION_WAITS + 5) + 2 * step["parameters"] + 8, update


def test_uploads_are_those_of_the_batches(step):
    """The state of optimizer and reference is offloaded to pinned memory."""
    rollout, scoring, update = (
        step["phases"][name].uploads for name in ("rollout", "scoring", "update")
    )
    assert total(rollout) <= ROLLOUT_BATCHES * (BATCH_UPLOADS + 8), rollout
    assert total(scoring) <= MICRO_BATCHES * BATCH_UPLOADS + 4, scoring
    # Two more are backward's, of an index on the CPU.
    assert total(update) <= MICRO_BATCHES * (BATCH_UPLOADS + 5) + 3, update


def test_the_only_products_in_float32_are_the_rotary_angles(step):
    products = {place for phase in step["phases"].values() for place in phase.float32_products}
    assert products == {"bmm models/language_model.py:LanguageModel._preprocess"}
