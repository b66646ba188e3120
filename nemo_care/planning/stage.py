"""One pipeline stage, built on `meta`, on which the real code of a step runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.transformer.module import MegatronModule
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.groups.batch import GroupBatch
from nemo_care.groups.batching import BatchLayout
from nemo_care.groups.group import Group
from nemo_care.megatron.experts import is_distributed_expert
from nemo_care.megatron.optimizer import optimizer_parts
from nemo_care.models.video_language_model import VideoLanguageModel
from nemo_care.planning.expert_dispatch import balanced_experts, forget_dispatch
from nemo_care.planning.fake_world import FakeRanks, exchanged_shape, fake_world, stage_rank
from nemo_care.planning.meta_memory import MetaMemory, flash_attention
from nemo_care.planning.precision import as_built, fp8_copies
from nemo_care.planning.shapes import Lengths, ModelShape, made_group, made_prompt
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.schema import Recipe, needs_reference
from nemo_care.rollouts.decoding import Decoding
from nemo_care.rollouts.generator import Sampling
from nemo_care.rollouts.megatron import MegatronGenerator
from nemo_care.scoring.reference import Reference
from nemo_care.scoring.scorer import Scorer
from nemo_care.training.build import build_model
from nemo_care.training.policy import Policy
from nemo_care.training.step import Step

_WINDOWS_TOGETHER = "nemo_care_flash_attention"


@dataclass(frozen=True)
class StageBuild:
    """What a rank of a stage holds all the time, in bytes (and parameters as a count).

    `unique_parameters` are the stage's parameters, over all of its tensor-parallel ranks, each
    counted once per replica: they sum to the model's. With `optimizer.offload`, `optimizer` is in
    host memory, and on the GPU only in the optimizer's step. With `algorithm.reference.offload`,
    `reference_average` is in host memory, and `reference_weights` are on the GPU only while
    scoring. `fp8_copies` are an estimate (see `planning/precision.py`), the rest is counted.
    """

    parameters: int
    unique_parameters: int
    weights: int
    gradients: int
    optimizer: int
    reference_average: int
    reference_weights: int
    fp8_copies: int = 0

    def held(self, recipe: Recipe) -> int:
        """Return the bytes on the GPU between the phases."""
        held = self.weights + self.gradients + self.fp8_copies
        if not recipe.optimizer.offload:
            held += self.optimizer
        if not recipe.algorithm.reference.offload:
            held += self.reference_average + self.reference_weights
        return held


@dataclass(frozen=True)
class StageUse:
    """The additional needs of the phases, in bytes, at their peaks.

    `update` is the peak of forward and backward with one micro-batch in flight. Each further one
    adds `micro_batch`: what it keeps for backward, of which the vision tower keeps `vision`.
    `optimizer_step` is the peak of the optimizer's step, including its state if that is offloaded.
    `inputs` are the patches of one micro-batch, part of all of these on the first stage.
    `output_layer` is the peak of the output layer alone. With vLLM rollouts, `rollout`
    and `key_value_cache` are 0, and `validation` is the scoring of completions while engines are
    awake (0 if these have separate GPUs). `kept_vision` is what a frozen vision tower leaves of one
    prompt until the end of the step, in addition to the phases.
    """

    rollout: int
    validation: int
    scoring: int
    update: int
    micro_batch: int
    optimizer_step: int
    inputs: int
    vision: int
    key_value_cache: int
    output_layer: int
    kept_vision: int


@dataclass
class Stage:
    """A built stage, with methods that run parts of a step on it."""

    recipe: Recipe
    shape: ModelShape
    ranks: FakeRanks
    memory: MetaMemory
    model: VideoLanguageModel
    policy: Policy
    reference: Reference | None
    layout: BatchLayout
    build: StageBuild

    def groups(self, lengths: Lengths, micro_batches: int) -> list[Group]:
        """Make the groups of `micro_batches` micro-batches."""
        algorithm = self.recipe.algorithm
        count = micro_batches * algorithm.groups_per_micro_batch
        return [
            made_group(lengths, self.shape.family, index, algorithm.group_size)
            for index in range(count)
        ]

    @contextmanager
    def exchanging(self, lengths: Lengths, *, answer_pairs: bool = False) -> Iterator[None]:
        """Set the shape of a micro-batch's hidden states between the stages."""
        groups = self.groups(lengths.text_only, 1)
        batch = self.layout.batches(groups, answer_pairs=answer_pairs)[0]
        with exchanged_shape(self._hidden(batch).shape):
            yield

    def kept_vision(self, lengths: Lengths) -> int:
        """Return the bytes that stay with a prompt of what a frozen vision tower makes of it."""
        groups = self.groups(lengths, 1)
        self.see(groups)
        states = groups[0].prompt.vision_states
        return 0 if states is None else states.nbytes

    def see(self, groups: Sequence[Group]) -> None:
        """Run a frozen vision tower on the groups' prompts, as an earlier phase has done."""
        if self.model.keeps_vision and self.ranks.is_first_stage:
            for batch in self.layout.batches(groups):
                batch.rows.inputs(self.model)

    @contextmanager
    def peak(self) -> Iterator[list[int]]:
        """Measure the peak of the block, above what is held before it."""
        found: list[int] = []
        before = self.memory.current
        self.memory.reset_peak()
        yield found
        found.append(self.memory.peak - before)

    def update(self, lengths: Lengths, micro_batches: int) -> tuple[int, int]:
        """Return the peak bytes of forward and backward, and of the optimizer's step."""
        peak, left = self.passes(lengths, micro_batches)
        return peak, left + self.step()

    def passes(self, lengths: Lengths, micro_batches: int) -> tuple[int, int]:
        """Return the peak bytes of forward and backward over micro-batches, and what they leave."""
        groups = self.groups(lengths, micro_batches)
        self.see(groups)
        before = self.memory.current
        left: list[int] = []

        def step() -> tuple[bool, float]:
            left.append(self.memory.current - before)
            return True, 0.0

        with (
            self.exchanging(lengths),
            patch.object(self.policy, "step_optimizer", step),
            self.peak() as found,
        ):
            self.policy.update(Step(0, trained=groups))
        return found[0], left[0]

    def step(self) -> int:
        """Return the peak bytes of the optimizer's step and the reference's update."""
        with self.peak() as found:
            self.policy.step_optimizer()
            if self.reference is not None:
                self.reference.average.update(self.model)
                self.reference.distance(self.model)
        return found[0]

    def score(self, lengths: Lengths) -> int:
        """Return the peak bytes of the scoring pass."""
        if self.reference is None:
            return 0
        groups = self.groups(lengths, 1)
        if self.recipe.rollout.backend == "megatron":
            self.see(groups)
        pairs = self.reference.answer_pairs
        with self.exchanging(lengths, answer_pairs=pairs), self.peak() as found:
            self.reference.score_answers(groups)
        return found[0]

    def score_by_policy(self, lengths: Lengths) -> int:
        """Return the peak bytes of a scoring pass with the policy itself."""
        scorer = Scorer(self.model, self.ranks, self.layout)
        groups = self.groups(lengths, 1)
        with self.exchanging(lengths), self.peak() as found:
            scorer.answer_likelihoods(groups)
        return found[0]

    def generate(self, lengths: Lengths, prompts: int, group_size: int) -> tuple[int, int]:
        """Return the peak bytes of generating for `prompts` prompts together, and of the cache."""
        rollout = self.recipe.rollout
        sampling = Sampling(group_size, rollout.temperature, rollout.top_p, lengths.completion, ())
        tokenizer = ChatTokenizer(base=None, eos_ids=frozenset({0}), pad_id=0)
        generator = MegatronGenerator(
            self.model,
            tokenizer,
            self.ranks,
            groups_per_batch=prompts,
            shared_prompt=self.recipe.algorithm.shared_prompt,
        )
        copies = 1 if generator.shared_prompt else group_size
        made = [made_prompt(lengths, self.shape.family, index) for index in range(prompts)]
        repeated = [prompt for prompt in made for _ in range(copies)]
        rows, hidden = prompts * group_size, self.shape.architecture.hidden_size
        with generator.inference(), self.peak() as found:
            decoding = Decoding(
                self.model, self.ranks, repeated, group_size // copies, sampling, tokenizer
            )
            # With stages, a micro-batch is one prompt.
            together = 1 if self.ranks.layout.pipeline > 1 else len(repeated)
            with exchanged_shape((lengths.prompt * together, 1, hidden)):
                logits = decoding.prefill().repeat_interleave(group_size // copies, dim=0)
            token, _ = decoding.choose(logits, torch.zeros(rows))
            # The last token, with the cache full.
            decoding.cache.tokens = lengths.completion - 1
            with exchanged_shape((rows, 1, hidden)):
                positions = torch.zeros(3, rows, dtype=torch.long)
                logits = decoding.decode(torch.zeros_like(token, device="cpu"), positions)
            decoding.choose(logits, torch.zeros(rows))
            cache = decoding.cache.nbytes
        return found[0], cache

    def output_layer(self, lengths: Lengths) -> int:
        """Return the peak bytes of one micro-batch's log-probabilities, forward and backward."""
        if not self.ranks.is_last_stage:
            return 0
        batch = self.layout.batches(self.groups(lengths.text_only, 1))[0]
        with self.peak() as found:
            hidden = self._hidden(batch)
            batch.log_probs(self.model, hidden, batch.mask).sum().backward()
        return found[0]

    def activations(self, lengths: Lengths) -> tuple[int, int]:
        """Return the bytes that a micro-batch keeps for backward, and the vision tower's part."""
        groups = self.groups(lengths, 1)
        self.see(groups)
        batch = self.layout.batches(groups)[0]
        self.policy.wrapped.train()
        with self._vision_bytes() as vision:
            forget_dispatch(self.model)
            before = self.memory.current
            if not self.ranks.is_first_stage:
                self.model.set_input_tensor(self._hidden(batch))
            out = self.model(batch.rows.inputs(self.model))
            kept = self.memory.current - before
        del out
        self.model.set_input_tensor(None)
        return kept, vision[0] if vision else 0

    def _hidden(self, batch: GroupBatch) -> torch.Tensor:
        """Make the hidden states that the previous stage would send for a micro-batch."""
        rows, tokens = batch.rows.token_ids.shape
        parallel = self.ranks.layout
        tokens //= parallel.tensor if parallel.sequence_parallel else 1
        size = (tokens, rows, self.shape.architecture.hidden_size)
        dtype = self.model.config.params_dtype
        return torch.empty(size, dtype=dtype, device="meta", requires_grad=True)

    @contextmanager
    def _vision_bytes(self) -> Iterator[list[int]]:
        """Measure what the vision tower keeps of each forward."""
        found: list[int] = []
        if not self.ranks.is_first_stage:
            yield found
            return
        forward = self.model.visual.forward

        def measured(*args: Any, **kwargs: Any) -> Any:
            before = self.memory.current
            out = forward(*args, **kwargs)
            found.append(self.memory.current - before)
            return out

        with patch.object(self.model.visual, "forward", measured):
            yield found


def _attend_windows(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Compute the vision tower's windows in one kernel call instead of thousands.

    Allocates the bytes of one call per window and their concatenation.
    """
    out = flash_attention(query, key, value, scale=scaling)
    return out.transpose(1, 2).contiguous().clone(), None


def _build_part(recipe: Recipe, ranks: FakeRanks, shape: ModelShape) -> VideoLanguageModel:
    with torch.device("meta"):
        model = build_model(as_built(recipe), ranks, shape.family)
    if ranks.is_first_stage:
        ALL_ATTENTION_FUNCTIONS.register(_WINDOWS_TOGETHER, _attend_windows)
        model.visual.config._attn_implementation = _WINDOWS_TOGETHER
    return model


@contextmanager
def built_stage(
    recipe: Recipe, shape: ModelShape, number: int, *, reference: bool = True
) -> Iterator[Stage]:
    """Build the first rank of a stage as `build_trainer` does, in a fake world.

    With `reference=False` the recipe's reference is omitted.

    Raises:
        InputError: the layout does not fit the world.
    """
    world = recipe.trainer.devices * recipe.trainer.num_nodes
    parallel = Layout.of(recipe)
    memory = MetaMemory()
    with (
        fake_world(parallel, stage_rank(parallel, number, world), world) as ranks,
        memory,
        balanced_experts(),
    ):
        layout = BatchLayout.of_recipe(recipe, parallel, pad_id=0)
        model = _build_part(recipe, ranks, shape)
        model.keeps_vision = "vision" in model.frozen
        weights = memory.current
        scorer, average, copy = None, 0, 0
        if reference and needs_reference(recipe.algorithm):
            twin = _build_part(recipe, ranks, shape)
            twin.share_frozen(model)
            copy = memory.current - weights
            scorer = Reference(twin, recipe.algorithm, ranks, layout)
            offload = recipe.algorithm.reference.offload
            average = memory.host if offload else memory.current - weights - copy
        before = memory.current + memory.host
        policy = Policy(model, recipe, ranks, layout)
        policy.optimizer_state.initialise()
        _step_as_on_a_gpu(policy)
        buffers = (*policy.wrapped.buffers, *policy.wrapped.expert_parallel_buffers)
        gradients = sum(buffer.grad_data.nbytes for buffer in buffers)
        build = StageBuild(
            parameters=sum(p.numel() for p in model.parameters()),
            unique_parameters=_unique_parameters(model, parallel),
            weights=weights,
            gradients=gradients,
            optimizer=memory.current + memory.host - before - gradients,
            reference_average=average,
            reference_weights=copy,
            fp8_copies=fp8_copies(recipe, model),
        )
        yield Stage(recipe, shape, ranks, memory, model, policy, scorer, layout, build)


def _unique_parameters(model: MegatronModule, parallel: Layout) -> int:
    """Count the stage's parameters over the ranks that share them, each once."""
    count = 0
    for name, parameter in model.named_parameters():
        tied = name.endswith("output_layer.weight") and model.share_embeddings_and_output_weights
        if not (tied and not model.pre_process):
            parts = parallel.tensor if getattr(parameter, "tensor_model_parallel", False) else 1
            if is_distributed_expert(parameter):
                parts = parallel.expert * parallel.expert_tensor_size
            count += parameter.numel() * parts
    return count


def _step_as_on_a_gpu(policy: Policy) -> None:
    """Use torch's AdamW as on a GPU: all parameters at once, with a temporary copy of a state."""
    for part in optimizer_parts(policy.optimizer):
        for group in part.optimizer.param_groups:
            group["foreach"] = True
