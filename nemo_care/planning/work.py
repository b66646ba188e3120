"""The time of a step, from its FLOPs and traffic at assumed efficiencies."""

from dataclasses import dataclass

from nemo_care.models.family import Family
from nemo_care.planning.counts import micro_batches_of, prompts_of, steps_ahead
from nemo_care.planning.engines import (
    EnginePlan,
    bytes_of_number,
    engine_plan,
    most_prompts,
    replica_in_a_machine,
)
from nemo_care.planning.flops import (
    ANSWER_ROWS,
    attention_flops,
    busiest_vision_flops,
    group_flops,
    head_flops,
    layer_flops,
    packed_tokens,
)
from nemo_care.planning.gpus import Gpu
from nemo_care.planning.precision import fp8_share
from nemo_care.planning.shapes import Lengths
from nemo_care.planning.stage import StageBuild
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.schema import Recipe, replicas_of


@dataclass(frozen=True)
class Efficiency:
    """Assumptions about the hardware; none of them was measured."""

    flops: float = 0.40
    """Share of the GPU's dense bf16 peak that matrix products and attention reach."""
    fp8_flops: float = 0.30
    """Share of the dense 8-bit peak that 8-bit matrix products reach, quantisation included."""
    bandwidth: float = 0.60
    """Share of the memory bandwidth that decoding reaches."""
    layer_microseconds: float = 300.0
    """Launching one layer's kernels for one decoded token, without CUDA graphs: about 25 (counted
    in tests/rollouts/test_decoding_steps.py), each called from Python in 12 microseconds."""
    graph_layer_microseconds: float = 50.0
    """The least that one layer's kernels take for one decoded token with CUDA graphs
    (rollout.cuda_graphs; vLLM captures them unless rollout.vllm.enforce_eager is set)."""
    nvlink_gb_s: float = 300.0
    """Collectives inside a machine, per GPU."""
    network_gb_s: float = 40.0
    """Collectives and stages across machines, per GPU."""
    host_gb_s: float = 20.0
    """Copies between CPU and GPU memory, per GPU."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step's phases.

    `asynchronous`: engines sample the next step's prompts while this step is scored and trained.
    """

    rollout: float
    scoring: float
    update: float
    asynchronous: bool = False

    def share(self, phase: str) -> float:
        """Return a phase's share of the step; if asynchronous, those of all phases exceed 1."""
        return self.as_json()[phase] / self.total

    @property
    def total(self) -> float:
        """Seconds of the step: the sum of its phases or, if asynchronous, the longer of the rollout
        and of scoring and update together."""
        if self.asynchronous:
            return max(self.rollout, self.scoring + self.update)
        return self.rollout + self.scoring + self.update

    def as_json(self) -> dict[str, float]:
        """Seconds by phase, and of the step."""
        return {
            "rollout": self.rollout,
            "scoring": self.scoring,
            "update": self.update,
            "step": self.total,
        }


@dataclass(frozen=True)
class _Forward:
    """Seconds of a micro-batch's forward on the slowest stage, and summed over all stages."""

    slowest: float
    all: float


class Clock:
    """Estimates the times of one recipe, layout and GPU."""

    def __init__(
        self,
        recipe: Recipe,
        family: Family,
        lengths: Lengths,
        gpu: Gpu,
        efficiency: Efficiency,
    ) -> None:
        """Create it for typical `lengths`."""
        self.recipe = recipe
        self.family = family
        self.model = family.architecture
        self.lengths = lengths
        self.gpu = gpu
        self.efficiency = efficiency
        self.tensor = recipe.model.tensor_model_parallel_size
        self.pipeline = recipe.model.pipeline_model_parallel_size
        self.replicas = replicas_of(recipe)
        self.fp8 = recipe.model.precision.fp8

    def step(self, builds: list[StageBuild]) -> StepTime:
        """Return the seconds of each phase."""
        rollout = self.recipe.rollout
        engines = rollout.backend == "vllm"
        return StepTime(
            self._engines_rollout(builds) if engines else self._rollout(builds),
            self._scoring(builds),
            self._update(builds),
            asynchronous=engines and rollout.asynchronous,
        )

    def _link(self, inside_a_machine: bool) -> float:
        """Return the bytes per second of collectives, per GPU."""
        assumed = self.efficiency
        return 1e9 * (assumed.nvlink_gb_s if inside_a_machine else assumed.network_gb_s)

    @property
    def _host_link(self) -> float:
        """Bytes per second between CPU and GPU memory, per GPU."""
        return 1e9 * self.efficiency.host_gb_s

    @property
    def _bandwidth(self) -> float:
        """Bytes per second that are read from the GPU's memory."""
        return self.gpu.bytes_per_second * self.efficiency.bandwidth

    def _forward(
        self, tokens: int, attention: float, head_rows: int, copies: int, fp8: bool, phase: str
    ) -> _Forward:
        """Return the seconds for `tokens` tokens and the vision of `copies` prompts in a phase."""
        speed = self.gpu.flops * self.efficiency.flops
        cut = self.tensor * self.pipeline
        products = layer_flops(self.model, tokens)
        quantised = products * fp8_share(self.recipe, self.model) if fp8 else 0.0
        layers = (products - quantised + attention) / cut / speed
        if quantised:
            layers += quantised / cut / (self.gpu.fp8_flops * self.efficiency.fp8_flops)
        vision = busiest_vision_flops(self.recipe, self.family, self.lengths, copies, phase) / speed
        if self.tensor > 1:
            # Two all-gathers and two reduce-scatters of the hidden states per layer.
            moved = 4 * tokens * self.model.hidden_size * 2 * (self.tensor - 1) / self.tensor
            link = self._link(self.tensor <= self.recipe.trainer.devices)
            layers += moved * self.model.layers / self.pipeline / link
            if self.recipe.model.vision.shard and vision:
                # One all-gather of the features.
                vision += moved / 4 * copies * self.lengths.vision / tokens / link
        layers += self._dispatch(tokens) / self.pipeline
        head = head_flops(self.model, head_rows) / self.tensor / speed
        ends = vision + head if self.pipeline == 1 else max(vision, head)
        return _Forward(layers + ends, layers * self.pipeline + vision + head)

    def _dispatch(self, tokens: int) -> float:
        """Return the seconds in which a rank's tokens travel to experts and back, in all layers.

        Every expert gets the same number of tokens.
        """
        layout, experts = Layout.of(self.recipe), self.model.experts
        if experts is None:
            return 0.0
        sent = tokens / self.tensor * experts.active * self.model.hidden_size * 2
        inside = layout.expert * layout.expert_tensor_size <= self.recipe.trainer.devices
        link = self._link(inside)
        seconds = 2 * sent * (layout.expert - 1) / layout.expert / link
        # The ranks of an expert's matrices gather each other's tokens, and add up their results.
        gathered = 2 * sent * (layout.expert_tensor_size - 1)
        seconds += gathered / self._link(inside_a_machine=True)
        return self.model.layers * seconds

    def _micro_batch(self, head_rows: int, fp8: bool, phase: str) -> _Forward:
        algorithm = self.recipe.algorithm
        groups, size = algorithm.groups_per_micro_batch, algorithm.group_size
        shared = algorithm.shared_prompt
        return self._forward(
            groups * packed_tokens(self.lengths, size, shared=shared),
            groups * attention_flops(self.model, self.lengths, size, shared=shared),
            groups * head_rows,
            groups * (1 if shared else size),
            fp8,
            phase,
        )

    def _rollout(self, builds: list[StageBuild]) -> float:
        algorithm, lengths, model = self.recipe.algorithm, self.lengths, self.model
        prompts = prompts_of(self.recipe)
        groups = min(self.recipe.rollout.groups_per_batch, prompts)
        batches = -(-prompts // groups)
        copies = groups if algorithm.shared_prompt else groups * algorithm.group_size
        attention = attention_flops(self.model, lengths.prompt_only, 1, shared=True)
        one = self._forward(lengths.prompt, attention, 1, 1, self.fp8.rollout, "rollout")
        # The prompts follow each other through the stages.
        prefill = one.all + (copies - 1) * one.slowest
        # Every token reads the weights, the prompts' keys and values and half of its own.
        cached = copies * lengths.prompt
        cached += groups * algorithm.group_size * lengths.completion // 2
        per_token = 2 * model.kv_size * 2 * model.layers / self.tensor
        read = sum(build.weights for build in builds) + cached * per_token
        token = read / self._bandwidth
        token += model.layers * self._launching(self.recipe.rollout.cuda_graphs)
        return batches * (prefill + lengths.completion * token)

    def _engines_rollout(self, builds: list[StageBuild]) -> float:
        """Return the seconds of sampling: the engine with the most prompts finishes last.

        Engines that are ahead get the prompts of several steps together; this is the share of one.
        """
        vllm, group = self.recipe.rollout.vllm, self.recipe.algorithm.group_size
        lengths, model = self.lengths, self.model
        parameters = sum(build.unique_parameters for build in builds)
        engine = engine_plan(self.recipe, model, parameters, self.gpu)
        assert engine is not None, "only called where vLLM samples"
        steps = max(steps_ahead(self.recipe), 1)
        size, prompts = vllm.tensor_parallel_size, steps * most_prompts(self.recipe)
        flops = group_flops(self.family, lengths.prompt_only, group, shared=True, rows=1)
        prefill = flops / size / (self.gpu.flops * self.efficiency.flops)
        # Two all-reduces of the hidden states per layer; an engine is inside a machine.
        moved = 4 * lengths.prompt * model.hidden_size * 2 * (size - 1) / size
        prefill += moved * model.layers / self._link(inside_a_machine=True)
        # The number of groups decoded together is limited by the cache.
        own = lengths.prompt + group * lengths.completion
        together = min(max(engine.cache_tokens // own, 1), prompts)
        turns = -(-prompts // together)
        # Every token reads the weights and, for each completion, the prompt's keys and values (they
        # are cached once, but vLLM's attention reads them for each) and half of its own.
        cached = together * group * (lengths.prompt + lengths.completion // 2)
        read = engine.weights + cached * engine.bytes_per_token
        token = read / self._bandwidth
        token += model.layers * self._launching(not vllm.enforce_eager)
        decoding = turns * lengths.completion * token
        return (prompts * prefill + decoding + self._sending(engine, parameters)) / steps

    def _launching(self, graphs: bool) -> float:
        """Seconds, at least, of one layer for one token."""
        assumed = self.efficiency
        return (assumed.graph_layer_microseconds if graphs else assumed.layer_microseconds) * 1e-6

    def _sending(self, engine: EnginePlan, parameters: int) -> float:
        """Return the seconds to send all weights to the engines, once per step."""
        inside = engine.placement == "colocated" and replica_in_a_machine(self.recipe)
        link = self._link(inside)
        # A sleeping engine copies these bytes to CPU memory and back.
        kept = 2 * engine.host / self._host_link
        return parameters * bytes_of_number(self.recipe) / link + kept

    def _pipelined(self, forward: _Forward, times: float) -> float:
        """Return the seconds of a step's micro-batches, including filling the pipeline."""
        return (micro_batches_of(self.recipe) + self.pipeline - 1) * forward.slowest * times

    def _scoring(self, builds: list[StageBuild]) -> float:
        algorithm = self.recipe.algorithm
        if not builds[0].reference_weights:
            return 0.0
        all_tokens = algorithm.kl_coefficient > 0
        rows = self.lengths.completion if all_tokens else ANSWER_ROWS
        scored = self._micro_batch(algorithm.group_size * rows, self.fp8.scoring, "scoring")
        seconds = self._pipelined(scored, 1)
        if algorithm.reference.offload:
            largest = max(build.reference_average for build in builds)
            seconds += largest / self._host_link
        return seconds

    def _update(self, builds: list[StageBuild]) -> float:
        algorithm = self.recipe.algorithm
        tokens = algorithm.group_size * self.lengths.completion
        forward = self._micro_batch(tokens, self.fp8.update, "update")
        times = {"none": 3.0, "selective": 3.2, "full": 4.0}[
            self.recipe.model.recompute_granularity
        ]
        if "language" in self.recipe.model.freeze:
            # No products for gradients of weights.
            times -= 1
        largest = max(build.gradients for build in builds)
        seconds = self._pipelined(forward, times)
        if self.replicas > 1:
            inside = self.tensor * self.replicas <= self.recipe.trainer.devices
            link = self._link(inside)
            # Gradients in float32 are summed and weights in two bytes gathered.
            seconds += largest * 1.5 * (self.replicas - 1) / self.replicas / link
        # AdamW reads and writes gradient, master weight and two moments.
        state = largest * 4 * 2 / self.replicas
        seconds += state / self._bandwidth
        if self.recipe.optimizer.offload:
            # To the GPU and back.
            moved = 2 * max(build.optimizer for build in builds)
            seconds += moved / self._host_link
        return algorithm.updates_per_rollout * seconds
