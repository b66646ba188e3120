"""The plan of a recipe: what every stage holds, what every phase needs, and whether it fits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from nemo_care.models.transformer_config import check_layout
from nemo_care.planning.counts import in_flight, micro_batches_of, prompts_of, replicas_of
from nemo_care.planning.engines import (
    EnginePlan,
    beside,
    bytes_of_number,
    engine_plan,
    workers_of_a_machine,
)
from nemo_care.planning.gpus import GIB, Gpu
from nemo_care.planning.precision import check_planned, precision_in_words
from nemo_care.planning.shapes import (
    Lengths,
    ModelShape,
    longest_lengths,
    read_model_shape,
    typical_lengths,
)
from nemo_care.planning.stage import StageBuild, StageUse, built_stage
from nemo_care.planning.work import Clock, Efficiency, StepTime, packed_tokens, step_flops
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.schema import Recipe, check_world, needs_reference
from nemo_care.rollouts.build import check_engines

PHASES = ("rollout", "validation", "scoring", "update")
GRANULARITIES = ("none", "selective", "full")
# CUDA's context and cuBLAS's workspaces; with several ranks NCCL's buffers for the groups.
_ALONE, _WITH_OTHERS = 1.0, 2.0
# Python, torch, Megatron and transformers in one rank's process; an engine's has about as much.
_PROCESS_GIB = 4.0


@dataclass(frozen=True)
class Question:
    """What to plan for: a GPU, the share of its memory to leave free, typical lengths."""

    gpu: Gpu
    margin: float = 0.1
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def budget(self) -> int:
        """Bytes that a plan may use."""
        return int(self.gpu.memory * (1 - self.margin))


@dataclass(frozen=True)
class StagePlan:
    """One stage: bytes held, bytes of each phase at its peak (everything included)."""

    stage: int
    build: StageBuild
    use: StageUse
    in_flight: int
    held: int
    peaks: dict[str, int]
    update_by_recomputation: dict[str, int]

    @property
    def peak(self) -> int:
        """The largest peak of all phases."""
        return max(self.peaks.values())

    @property
    def peak_phase(self) -> str:
        """The phase of that peak."""
        return max(self.peaks, key=lambda phase: self.peaks[phase])


@dataclass(frozen=True)
class Plan:
    """Everything that `nemo-care plan` tells; memory in bytes, time in seconds."""

    recipe: Recipe
    shape: ModelShape
    question: Question
    longest: Lengths
    typical: Lengths
    stages: list[StagePlan]
    allowance: int
    host: dict[str, int]
    checkpoint_bytes: int
    flops: dict[str, float]
    seconds: StepTime
    engine: EnginePlan | None = None

    @property
    def parameters(self) -> int:
        """Parameters of the model."""
        return sum(stage.build.unique_parameters for stage in self.stages)

    @property
    def worst(self) -> StagePlan:
        """The stage with the largest peak."""
        return max(self.stages, key=lambda stage: stage.peak)

    @property
    def fits(self) -> bool:
        """Whether every stage fits the GPU with the margin left, and an engine its share."""
        return self.stages_fit and (self.engine is None or self.engine.fits)

    @property
    def stages_fit(self) -> bool:
        """Whether every stage fits, engines on its GPUs included."""
        return self.worst.peak <= self.question.budget

    def tokens(self) -> dict[str, int]:
        """Tokens of one typical group in the update, with the prompt shared and without."""
        size = self.recipe.algorithm.group_size
        return {
            "shared": packed_tokens(self.typical, size, shared=True),
            "separate": packed_tokens(self.typical, size, shared=False),
        }


@contextmanager
def _with(recipe: Recipe, granularity: str) -> Iterator[Recipe]:
    changed = deepcopy(recipe)
    changed.model.recompute_granularity = granularity
    yield changed


def phase_peaks(
    recipe: Recipe,
    build: StageBuild,
    use: StageUse,
    stage: int,
    allowance: int,
    engine: EnginePlan | None,
) -> dict[str, int]:
    """Bytes at each phase's peak on a GPU of this stage, everything included."""
    count = micro_batches_of(recipe)
    extra = {
        "rollout": use.rollout,
        "validation": use.validation,
        "scoring": use.scoring_peak(count),
        "update": use.update_peak(in_flight(recipe, stage), count),
    }
    held = build.held(recipe)
    awake = beside(engine, "rollout")
    return {
        phase: held + extra[phase] + allowance + beside(engine, phase)
        for phase in PHASES
        if extra[phase] or (phase == "rollout" and awake)
    }


def allowance_of(recipe: Recipe) -> int:
    """Bytes for what torch's allocator does not give out."""
    alone = recipe.trainer.devices * recipe.trainer.num_nodes == 1
    return int((_ALONE if alone else _WITH_OTHERS) * GIB)


def host_memory(
    recipe: Recipe,
    shape: ModelShape,
    longest: Lengths,
    worst: StageBuild,
    engine: EnginePlan | None,
) -> dict[str, int]:
    """Bytes of CPU memory per machine, by what takes them."""
    model, trainer = recipe.model, recipe.trainer
    ranks = trainer.devices
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    leaders = max(ranks // replica, 1)
    prompts = prompts_of(recipe)
    patches = prompts * longest.patches * shape.family.prompt.patching.values * 4
    parameters = worst.gradients // 4
    # The first replica's ranks put the optimizer's state together in CPU memory: three float32
    # tensors of all their parameters, and one of the three twice more while it arrives. Every rank
    # has its own shards. The copies of weights and average, made afterwards, take no more.
    gathered = 4 * parameters * (3 + 2) * _first_replica_on_a_machine(recipe)
    shards = ranks * 4 * 3 * parameters // replicas_of(recipe)
    offload = recipe.algorithm.reference.offload and needs_reference(recipe.algorithm)
    workers = workers_of_a_machine(recipe)
    asleep = workers * engine.host if engine is not None else 0
    engines = {"engines": int(workers * _PROCESS_GIB * GIB) + asleep} if workers else {}
    return {
        "processes": int(ranks * _PROCESS_GIB * GIB),
        "reference": ranks * worst.reference_average if offload else 0,
        "optimizer": ranks * worst.optimizer if recipe.optimizer.offload else 0,
        "prompts": ranks * patches * (1 + recipe.data.prefetch_steps),
        "decoding": int(leaders * recipe.data.workers * recipe.data.worker_memory_gib * GIB),
        "saving a checkpoint": gathered + shards,
        **engines,
    }


def _first_replica_on_a_machine(recipe: Recipe) -> int:
    """The most ranks of the first replica that one machine has; ranks count tensor, data, stage."""
    tensor = recipe.model.tensor_model_parallel_size
    on_each = [0] * recipe.trainer.num_nodes
    for rank in range(recipe.trainer.devices * recipe.trainer.num_nodes):
        on_each[rank // recipe.trainer.devices] += rank // tensor % replicas_of(recipe) == 0
    return max(on_each)


def checkpoint_size(recipe: Recipe, builds: list[StageBuild]) -> int:
    """Bytes of one checkpoint: weights, master weights with AdamW's moments, the average."""
    width = bytes_of_number(recipe)
    average = 4 if needs_reference(recipe.algorithm) else 0
    total = 0
    for build in builds:
        trained = min(build.gradients / 4 / build.parameters, 1.0)
        total += int(build.unique_parameters * (width + average + trained * 12))
    return total


class Measurements:
    """Stages that were built, each once: stages of the same kind are alike."""

    def __init__(self, recipe: Recipe, shape: ModelShape, lengths: Lengths) -> None:
        """`lengths` are those that the memory is planned for."""
        self.recipe = recipe
        self.shape = shape
        self.lengths = lengths
        self._uses: dict[tuple, StageUse] = {}
        self._updates: dict[tuple, tuple[int, int, int]] = {}

    def stage(self, number: int) -> tuple[StageBuild, StageUse]:
        """Build a stage; run its phases unless a stage like it has run them."""
        with built_stage(self.recipe, self.shape, number) as stage:
            kind = self._kind(number, stage.build)
            if kind not in self._uses:
                self._uses[kind] = stage.use(self.lengths)
            return stage.build, self._uses[kind]

    def update(self, number: int, build: StageBuild, granularity: str) -> tuple[int, int, int]:
        """Of the update with another recomputation: both its peaks, and a micro-batch's bytes."""
        key = (*self._kind(number, build), granularity)
        if key not in self._updates:
            with (
                _with(self.recipe, granularity) as recipe,
                built_stage(recipe, self.shape, number, reference=False) as stage,
            ):
                passes, step = stage.update(self.lengths, 1)
                more = stage.build.fp8_copies - build.fp8_copies
                kept = stage.activations(self.lengths)[0]
                self._updates[key] = (passes + more, step + more, kept)
        return self._updates[key]

    def _kind(self, number: int, build: StageBuild) -> tuple:
        last = self.recipe.model.pipeline_model_parallel_size - 1
        return number == 0, number == last, build.parameters


def make_plan(recipe: Recipe, question: Question, *, compare: bool = True) -> Plan:
    """Build every stage in a fake world and put the plan together.

    `compare` runs the update under every recomputation, not only under the recipe's.

    Raises:
        InputError: a layout that does not fit the model or the world, or an unknown model.
    """
    shape = read_model_shape(recipe.model.hf_path)
    check_layout(shape.architecture, Layout.of(recipe))
    check_world(recipe)
    check_planned(recipe, shape.architecture, question.gpu)
    check_engines(recipe, shape.architecture)
    longest = longest_lengths(recipe, shape.family)
    typical = typical_lengths(
        recipe, shape.family, question.prompt_tokens, question.completion_tokens
    )
    measured = Measurements(recipe, shape, longest)
    allowance = allowance_of(recipe)
    found = [measured.stage(n) for n in range(recipe.model.pipeline_model_parallel_size)]
    builds = [build for build, _ in found]
    parameters = sum(build.unique_parameters for build in builds)
    engine = engine_plan(recipe, shape.architecture, parameters, question.gpu)
    granularities = GRANULARITIES if compare else ()
    stages = [
        _stage_plan(measured, number, build, use, allowance, engine, granularities)
        for number, (build, use) in enumerate(found)
    ]
    clock = Clock(recipe, shape.family, typical, question.gpu, question.efficiency)
    return Plan(
        recipe=recipe,
        shape=shape,
        question=question,
        longest=longest,
        typical=typical,
        stages=stages,
        allowance=allowance,
        host=host_memory(recipe, shape, longest, max(builds, key=lambda b: b.gradients), engine),
        checkpoint_bytes=checkpoint_size(recipe, builds),
        flops=step_flops(recipe, shape.family, typical),
        seconds=clock.step(builds),
        engine=engine,
    )


def _stage_plan(
    measured: Measurements,
    number: int,
    build: StageBuild,
    use: StageUse,
    allowance: int,
    engine: EnginePlan | None,
    granularities: Sequence[str],
) -> StagePlan:
    recipe = measured.recipe
    peaks = phase_peaks(recipe, build, use, number, allowance, engine)
    flying, count = in_flight(recipe, number), micro_batches_of(recipe)
    held = build.held(recipe)
    own = recipe.model.recompute_granularity
    by_recomputation = {own: peaks["update"]}
    for granularity in granularities:
        if granularity != own:
            passes, step, kept = measured.update(number, build, granularity)
            update = max(passes + (flying - 1) * kept, step) + count * use.inputs
            by_recomputation[granularity] = held + update + allowance + beside(engine, "update")
    return StagePlan(
        stage=number,
        build=build,
        use=use,
        in_flight=flying,
        held=held,
        peaks=peaks,
        update_by_recomputation=by_recomputation,
    )


def plan_as_json(plan: Plan, remedies: list[str]) -> dict[str, Any]:
    """The plan as plain values; keys are part of the command's contract."""
    recipe, question = plan.recipe, plan.question
    return {
        "model": {
            "source": plan.shape.source,
            "parameters": plan.parameters,
            "checkpoint_bytes": plan.checkpoint_bytes,
        },
        "layout": {
            "nodes": recipe.trainer.num_nodes,
            "devices": recipe.trainer.devices,
            "tensor": recipe.model.tensor_model_parallel_size,
            "pipeline": recipe.model.pipeline_model_parallel_size,
            "data": replicas_of(recipe),
            "sequence_parallel": recipe.model.sequence_parallel,
            "recompute_granularity": recipe.model.recompute_granularity,
            "precision": precision_in_words(recipe),
            "micro_batches": micro_batches_of(recipe),
        },
        "gpu": {
            "name": question.gpu.name,
            "memory_bytes": question.gpu.memory,
            "margin": question.margin,
            "budget_bytes": question.budget,
            "allowance_bytes": plan.allowance,
        },
        "lengths": {"memory": asdict(plan.longest), "time": asdict(plan.typical)},
        "stages": [asdict(stage) | {"peak": stage.peak} for stage in plan.stages],
        "host_bytes": plan.host,
        "flops": plan.flops,
        "seconds": plan.seconds.as_json(),
        "assumed": asdict(question.efficiency),
        "tokens_per_group": plan.tokens(),
        "engine": plan.engine.as_json() if plan.engine is not None else None,
        "peak_bytes": plan.worst.peak,
        "fits": plan.fits,
        "remedies": remedies,
    }
