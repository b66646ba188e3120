"""Decoding in few kernels: rotation, attention in two parts, and steps that a graph can replay."""

from contextlib import contextmanager

import pytest
import torch
from made_cuda import with_cuda_products
from made_groups import make_prompts
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from small_runs import small_recipe, small_trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_care.models import flash_decoding
from nemo_care.models.decoding_cache import DecodingCache, Rotation
from nemo_care.planning.work import Efficiency
from nemo_care.rollouts import fixed_decoding
from nemo_care.rollouts.decoding import Decoding
from nemo_care.rollouts.fixed_decoding import FixedDecoding
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.megatron import MegatronGenerator
from nemo_care.rollouts.sampling import uniform_numbers

pytestmark = pytest.mark.numeric

# What the CPU reads of the device's values, which on CUDA waits for all that was launched.
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique_dim", "_unique2"}
# What makes a tensor of the CPU's values: on CUDA an upload.
UPLOADS = {"lift_fresh", "lift", "lift_fresh_copy"}
# What runs no kernel: views, and memory without values.
FREE = {"detach", "empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view"}


@pytest.fixture(scope="module")
def trainer(checkpoint, world, ranks, tmp_path_factory):
    return small_trainer(small_recipe(checkpoint, world), ranks, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def prompts(checkpoint, world, tmp_path_factory):
    return make_prompts(checkpoint, world, tmp_path_factory.mktemp("images"))


@pytest.fixture
def flash(monkeypatch):
    """Attention in two parts on the CPU too."""
    monkeypatch.setattr(flash_decoding, "usable", lambda query: True)


def sampling(tokens: int, temperature: float = 1.0) -> Sampling:
    return Sampling(4, temperature, 0.95, tokens, (5,))


def generate(trainer, prompts, sampling, **options):
    tokenizer = trainer.generator.tokenizer
    generator = MegatronGenerator(
        trainer.policy.model, tokenizer, trainer.ranks, groups_per_batch=4, **options
    )
    groups = generator.generate(prompts, sampling)
    return [c for group in groups for c in group.completions]


def assert_same(ours, wanted):
    assert [c.token_ids.tolist() for c in ours] == [c.token_ids.tolist() for c in wanted]
    for mine, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine.log_probs, other.log_probs, atol=1e-4, rtol=1e-4)


@contextmanager
def decoding_of(trainer, prompts, kind=Decoding):
    tokenizer = trainer.generator.tokenizer
    model = trainer.policy.model
    generator = MegatronGenerator(model, tokenizer, trainer.ranks, groups_per_batch=4)
    with generator.inference():
        yield kind(model, trainer.ranks, prompts, 4, sampling(48), tokenizer)


class Trace(TorchDispatchMode):
    """Each kernel call: its name, shapes and values; and the memory that it did not make itself."""

    def __init__(self):
        super().__init__()
        self.calls, self.outside, self._made, self._kept = [], set(), set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, leaves = func._schema.name.split("::")[1], tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        pointers = {x.untyped_storage().data_ptr() for x in tensors if x.numel()}
        self.outside |= pointers - self._made
        for result in tree_leaves(out):
            if isinstance(result, torch.Tensor):
                # Kept, or freed memory would come back under the same address.
                self._kept.append(result)
                pointer = result.untyped_storage().data_ptr()
                if pointer not in pointers and pointer not in self.outside:
                    self._made.add(pointer)
        if not func.is_view and name not in FREE:
            shapes = [
                (tuple(leaf.shape), leaf.stride()) if isinstance(leaf, torch.Tensor) else str(leaf)
                for leaf in leaves
            ]
            self.calls.append((name, shapes))
        return out

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_of_queries_and_keys_together_is_megatrons_to_the_last_bit(trainer, dtype):
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(9, 1, 1, 16, generator=generator) * 100
    query = torch.randn(9, 1, 4, 16, generator=generator).to(dtype)
    key = torch.randn(9, 1, 2, 16, generator=generator).to(dtype)
    ours = Rotation(angles, dtype)(query[:, 0], key[:, 0])
    for mine, x in zip(ours, (query, key), strict=True):
        wanted = apply_rotary_pos_emb(x, angles, trainer.policy.model.config)
        assert torch.equal(mine, wanted[:, 0])


@pytest.mark.parametrize("fixed", [False, True])
def test_attention_in_parts_is_attention_in_one(fixed, monkeypatch):
    """Prompts of unequal length, and, without a fixed shape, rows of which some have ended."""
    generator = torch.Generator().manual_seed(0)
    results = []
    lengths, group, key_heads, heads, width = [5, 9, 3], 2, 2, 4, 16

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    for parts in (False, True):
        monkeypatch.setattr(flash_decoding, "usable", lambda query, parts=parts: parts)
        generator.manual_seed(0)
        cache = DecodingCache(lengths, group, max_tokens=20, fixed=fixed)
        (packed,) = cache.passes()
        cache.store_prompts(
            1, packed, *(drawn(sum(lengths), 1, key_heads, width) for _ in range(2))
        )
        rows, found = 6, []
        for step in range(4):
            if fixed:
                cache.begin_step(torch.float32)
            new = drawn(rows, 1, heads, width), *(drawn(rows, 1, key_heads, width) for _ in "kv")
            found.append(cache.attend(1, *new, None))
            cache.advance()
            if step == 1 and not fixed:
                rows = 3
                # The second prompt's completions have all ended.
                cache.keep(torch.tensor([0, 1, 5]))
        results.append(torch.cat(found))
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)


def test_completions_are_the_same_with_attention_in_parts(trainer, prompts, flash, monkeypatch):
    ours = generate(trainer, prompts, sampling(24))
    fixed = generate(trainer, prompts, sampling(24), cuda_graphs=True)
    monkeypatch.undo()
    wanted = generate(trainer, prompts, sampling(24))
    assert_same(ours, wanted)
    assert_same(fixed, wanted)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_steps_of_a_fixed_shape_sample_the_same_tokens(trainer, prompts, temperature):
    """And stop soon after the last completion has ended."""
    steps = []
    real = FixedDecoding.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FixedDecoding, "step", lambda self: steps.append(real(self)))
        ours = generate(trainer, prompts, sampling(64, temperature), cuda_graphs=True)
    wanted = generate(trainer, prompts, sampling(64, temperature))
    assert_same(ours, wanted)
    longest = max(c.length for c in wanted)
    assert longest < 64 - fixed_decoding.LOOK_EVERY, "the completions end too late for this test"
    assert longest <= len(steps) + 1 <= longest + fixed_decoding.LOOK_EVERY + 1


def test_logits_of_the_next_token_are_those_of_the_output_layer(trainer):
    """On a CPU to the last bit; on CUDA without rounding them to bf16 first."""
    model = trainer.policy.model
    weight = model._output_weight().detach()
    hidden = torch.randn(5, 1, weight.shape[1], generator=torch.Generator().manual_seed(0))
    places = torch.tensor([4, 0, 2])
    with torch.no_grad():
        wanted, _ = model.language_model.output_layer(hidden[places], weight=weight)
        assert torch.equal(
            model.next_token_logits(hidden, places), wanted[:, 0, : model.vocab_size]
        )
        with pytest.MonkeyPatch.context() as patch, with_cuda_products():
            patch.setattr(model, "_output_weight", weight.bfloat16)
            hidden = hidden.bfloat16()
            ours = model.next_token_logits(hidden, places)
    exact = hidden[places, 0].double() @ weight.bfloat16().double().t()
    torch.testing.assert_close(ours.double(), exact[:, : model.vocab_size], atol=1e-5, rtol=1e-5)


def test_prompts_one_after_another_are_cached_as_together(trainer, prompts):
    """What pipeline stages do, so that none waits for all prompts."""
    caches, logits = [], []
    for apart in (False, True):
        with decoding_of(trainer, prompts) as decoding:
            decoding.cache._apart = apart
            logits.append(decoding.prefill())
        assert len(decoding.cache.passes()) == (len(prompts) if apart else 1)
        caches.append(decoding.cache._prompt)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
    for layer, pair in caches[0].items():
        torch.testing.assert_close(caches[1][layer], pair, atol=1e-4, rtol=1e-4)


def test_every_step_of_a_fixed_shape_is_the_same_to_a_graph(trainer, prompts, flash):
    """No wait, no upload, the same kernels with the same values, at the same addresses."""
    traces = []
    with decoding_of(trainer, prompts, FixedDecoding) as decoding:
        real = decoding.step

        def traced():
            with Trace() as trace:
                real()
            traces.append(trace)

        decoding.step = traced
        decoding.run(uniform_numbers((5,), [p.index for p in prompts], 4, 48))
    # The first makes the cache, before anything is captured.
    first, *others = traces[1:]
    assert len(others) > fixed_decoding.LOOK_EVERY
    assert not (WAITS | UPLOADS) & set(first.names)
    for other in others:
        assert other.calls == first.calls
        assert other.outside == first.outside


def test_a_default_step_is_not_the_same_to_a_graph(trainer, prompts):
    """The trace of the test above sees what a graph could not repeat."""
    with decoding_of(trainer, prompts[:1]) as decoding:
        decoding.prefill()
        token, positions = torch.zeros(4, dtype=torch.long), decoding._first_positions()
        traces = []
        for step in range(3):
            with Trace() as trace:
                decoding.decode(token, positions + step)
            traces.append(trace)
    assert traces[1].calls != traces[2].calls


def kernels_of_a_layer(trainer, prompts, kind) -> list[str]:
    """What the first layer calls for one token, once the cache is made; of each norm one call."""
    layer, traces = trainer.policy.model.language_model.decoder.layers[0], []

    def begin(module, args, kwargs):
        if isinstance(kwargs["packed_seq_params"], DecodingCache):
            traces.append(Trace())
            traces[-1].__enter__()

    def end(module, args, kwargs, output):
        if isinstance(kwargs["packed_seq_params"], DecodingCache):
            traces[-1].__exit__(None, None, None)

    hooks = [
        layer.register_forward_pre_hook(begin, with_kwargs=True),
        layer.register_forward_hook(end, with_kwargs=True),
    ]
    for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
        # On CUDA a norm is one kernel.
        norm.forward = lambda x, norm=norm: x * norm.weight
    try:
        with decoding_of(trainer, prompts, kind) as decoding:
            decoding.run(uniform_numbers((5,), [p.index for p in prompts], 4, 48))
    finally:
        for norm in (layer.input_layernorm, layer.pre_mlp_layernorm):
            del norm.forward
        for hook in hooks:
            hook.remove()
    return traces[1].names


@pytest.mark.parametrize("kind", [Decoding, FixedDecoding])
def test_a_layer_takes_few_kernels_for_a_token(trainer, prompts, flash, kind):
    kernels = kernels_of_a_layer(trainer, prompts[:1], kind)
    assert len(kernels) <= 25, kernels
    # What the plan counts with: 12 microseconds each.
    assert 12 * len(kernels) == pytest.approx(Efficiency().layer_microseconds, rel=0.05)


def test_a_layer_takes_no_more_kernels_on_a_cpu_than_it_did_without_rotation(trainer, prompts):
    kernels = kernels_of_a_layer(trainer, prompts[:1], Decoding)
    assert len(kernels) <= 36, kernels
