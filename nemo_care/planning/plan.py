"""The plan of a recipe: memory of every stage and phase, times, and whether it fits."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from nemo_care.models.transformer_config import check_layout
from nemo_care.planning.counts import in_flight, micro_batches_of, prompts_of, steps_ahead
from nemo_care.planning.engines import (
    EnginePlan,
    beside,
    bytes_of_number,
    engine_plan,
    workers_of_a_machine,
)
from nemo_care.planning.flops import packed_tokens, step_flops
from nemo_care.planning.gpus import GIB, Gpu
from nemo_care.planning.measured import PHASES, Measurements
from nemo_care.planning.precision import check_planned, precision_in_words
from nemo_care.planning.shapes import (
    Lengths,
    ModelShape,
    frame_bytes,
    longest_lengths,
    read_model_shape,
    typical_lengths,
)
from nemo_care.planning.stage import StageBuild, StageUse
from nemo_care.planning.work import Clock, Efficiency, StepTime
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.schema import Recipe, check_world, needs_reference, replicas_of
from nemo_care.rollouts.build import check_engines

GRANULARITIES = ("none", "selective", "full")
# GiB. CUDA's context and cuBLAS's workspaces; with several ranks also NCCL's buffers.
_ALONE, _WITH_OTHERS = 1.0, 2.0
# Python, torch, Megatron and transformers in a rank's process; an engine needs about as much.
_PROCESS_GIB = 4.0


@dataclass(frozen=True)
class Question:
    """The conditions of a plan: a GPU, the share of its memory to keep free, typical lengths."""

    gpu: Gpu
    margin: float = 0.1
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    efficiency: Efficiency = field(default_factory=Efficiency)

    @property
    def budget(self) -> int:
        """Bytes that a plan can use."""
        return int(self.gpu.memory * (1 - self.margin))


@dataclass(frozen=True)
class StagePlan:
    """One stage: bytes held, and bytes of each phase at its peak (everything included)."""

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
        """The phase with that peak."""
        return max(self.peaks, key=lambda phase: self.peaks[phase])


@dataclass(frozen=True)
class Plan:
    """All results of `nemo-care plan`; memory in bytes, time in seconds."""

    recipe: Recipe
    measured: Measurements
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
    def shape(self) -> ModelShape:
        """The model's configuration."""
        return self.measured.shape

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
        """Whether every stage fits the GPU with the margin, and an engine its share."""
        return self.stages_fit and (self.engine is None or self.engine.fits)

    @property
    def stages_fit(self) -> bool:
        """Whether every stage fits, engines on its GPUs included."""
        return self.worst.peak <= self.question.budget

    def tokens(self) -> dict[str, int]:
        """Tokens of a typical group in the update, with and without prompt sharing."""
        size = self.recipe.algorithm.group_size
        return {
            "shared": packed_tokens(self.typical, size, shared=True),
            "separate": packed_tokens(self.typical, size, shared=False),
        }


def phase_peaks(
    recipe: Recipe, measured: Measurements, stage: int, engine: EnginePlan | None
) -> Iterator[tuple[str, int]]:
    """Yield the bytes at each phase's peak on a GPU of this stage, everything included.

    A phase is measured when its peak is requested; the update, often the largest, comes first.
    """
    fixed = measured.build(recipe, stage).held(recipe) + allowance_of(recipe)
    fixed += measured.kept_vision(recipe, stage)
    awake = beside(engine, "rollout")
    for phase in reversed(PHASES):
        needs = measured.needs(recipe, stage, phase)
        if needs or (phase == "rollout" and awake):
            yield phase, fixed + needs + beside(engine, phase)


def allowance_of(recipe: Recipe) -> int:
    """Return the bytes that are allocated outside of torch's allocator."""
    alone = recipe.trainer.devices * recipe.trainer.num_nodes == 1
    return int((_ALONE if alone else _WITH_OTHERS) * GIB)


def host_memory(
    recipe: Recipe,
    shape: ModelShape,
    longest: Lengths,
    worst: StageBuild,
    engine: EnginePlan | None,
) -> dict[str, int]:
    """Return the bytes of CPU memory per machine, by purpose."""
    model, trainer = recipe.model, recipe.trainer
    ranks = trainer.devices
    replica = model.tensor_model_parallel_size * model.pipeline_model_parallel_size
    leaders = max(ranks // replica, 1)
    prompts = prompts_of(recipe)
    frames = prompts * frame_bytes(longest, shape.family)
    # Of a replica, its leader alone holds the step's frames and those decoded ahead: with
    # rollout.asynchronous those of other steps are sampled meanwhile, and engines of other ranks
    # get copies of theirs.
    ahead = steps_ahead(recipe)
    copies = 1 + recipe.data.prefetch_steps + ahead
    copies += max(ahead, 1) if recipe.rollout.backend == "vllm" else 0
    parameters = worst.gradients // 4
    # The first replica's ranks gather the optimizer's state in CPU memory: three float32
    # tensors of all their parameters, and two further copies of one while it arrives. Every rank
    # has its own shards. The copies of weights and average, made afterwards, need no more.
    # Replicas that share experts hold one model's together.
    in_step = Layout.of(recipe).replicas_in_step
    gathered = 4 * parameters * (3 + 2) * _first_replica_on_a_machine(recipe)
    shards = ranks * 4 * 3 * parameters * in_step // replicas_of(recipe)
    offload = recipe.algorithm.reference.offload and needs_reference(recipe.algorithm)
    workers = workers_of_a_machine(recipe)
    asleep = workers * engine.host if engine is not None else 0
    engines = {"engines": int(workers * _PROCESS_GIB * GIB) + asleep} if workers else {}
    return {
        "processes": int(ranks * _PROCESS_GIB * GIB),
        "reference": ranks * worst.reference_average if offload else 0,
        "optimizer": ranks * worst.optimizer if recipe.optimizer.offload else 0,
        "prompts": leaders * frames * copies,
        "decoding": int(leaders * recipe.data.workers * recipe.data.worker_memory_gib * GIB),
        "saving a checkpoint": gathered + shards,
        **engines,
    }


def _first_replica_on_a_machine(recipe: Recipe) -> int:
    """Return the most ranks on one machine of the first replica, or of those in step with it.

    Ranks count tensor, data, stage.
    """
    in_step = Layout.of(recipe).replicas_in_step
    tensor = recipe.model.tensor_model_parallel_size
    on_each = [0] * recipe.trainer.num_nodes
    for rank in range(recipe.trainer.devices * recipe.trainer.num_nodes):
        on_each[rank // recipe.trainer.devices] += rank // tensor % replicas_of(recipe) < in_step
    return max(on_each)


def checkpoint_size(recipe: Recipe, builds: list[StageBuild]) -> int:
    """Return the bytes of a checkpoint: weights, master weights, AdamW's moments, the average."""
    width = bytes_of_number(recipe)
    average = 4 if needs_reference(recipe.algorithm) else 0
    total = 0
    for build in builds:
        trained = min(build.gradients / 4 / build.parameters, 1.0)
        total += int(build.unique_parameters * (width + average + trained * 12))
    return total


def make_plan(
    recipe: Recipe,
    question: Question,
    *,
    compare: bool = True,
    measured: Measurements | None = None,
) -> Plan:
    """Build every stage in a fake world and make the plan.

    `compare` measures the update under every recomputation, not only the recipe's. `measured` are
    the measurements of a plan of which this recipe is a variant.

    Raises:
        InputError: a layout that does not fit the model or the world, or an unknown model.
    """
    measured = measured or Measurements(read_model_shape(recipe.model.hf_path))
    shape = measured.shape
    check_plannable(recipe, shape, question.gpu)
    typical = typical_lengths(
        recipe, shape.family, question.prompt_tokens, question.completion_tokens
    )
    # All parts of a stage together, so that it is built once.
    uses = [measured.use(recipe, n) for n in range(recipe.model.pipeline_model_parallel_size)]
    builds = measured.builds(recipe)
    engine = planned_engine(recipe, measured, question)
    longest = longest_lengths(recipe, shape.family)
    clock = Clock(recipe, shape.family, typical, question.gpu, question.efficiency)
    return Plan(
        recipe=recipe,
        measured=measured,
        question=question,
        longest=longest,
        typical=typical,
        stages=[
            _stage_plan(recipe, measured, number, use, engine, GRANULARITIES if compare else ())
            for number, use in enumerate(uses)
        ],
        allowance=allowance_of(recipe),
        host=host_memory(recipe, shape, longest, max(builds, key=lambda b: b.gradients), engine),
        checkpoint_bytes=checkpoint_size(recipe, builds),
        flops=step_flops(recipe, shape.family, typical),
        seconds=clock.step(builds),
        engine=engine,
    )


def check_plannable(recipe: Recipe, shape: ModelShape, gpu: Gpu) -> None:
    """Reject a recipe that no run could start.

    Raises:
        InputError: names the keys.
    """
    check_layout(shape.architecture, Layout.of(recipe))
    check_world(recipe)
    check_planned(recipe, shape.architecture, gpu)
    check_engines(recipe, shape.architecture)


def planned_engine(recipe: Recipe, measured: Measurements, question: Question) -> EnginePlan | None:
    """Plan the recipe's engines, for a model whose size follows from its stages."""
    parameters = sum(build.unique_parameters for build in measured.builds(recipe))
    return engine_plan(recipe, measured.shape.architecture, parameters, question.gpu)


def _stage_plan(
    recipe: Recipe,
    measured: Measurements,
    number: int,
    use: StageUse,
    engine: EnginePlan | None,
    granularities: Sequence[str],
) -> StagePlan:
    peaks = dict(phase_peaks(recipe, measured, number, engine))
    by_recomputation = {recipe.model.recompute_granularity: peaks["update"]}
    for granularity in granularities:
        if granularity not in by_recomputation:
            changed = deepcopy(recipe)
            changed.model.recompute_granularity = granularity
            by_recomputation[granularity] = next(
                peak
                for phase, peak in phase_peaks(changed, measured, number, engine)
                if phase == "update"
            )
    build = measured.build(recipe, number)
    return StagePlan(
        stage=number,
        build=build,
        use=use,
        in_flight=in_flight(recipe, number),
        held=build.held(recipe),
        peaks={phase: peaks[phase] for phase in PHASES if phase in peaks},
        update_by_recomputation=by_recomputation,
    )


def plan_as_json(plan: Plan, remedies: list[str]) -> dict[str, Any]:
    """Return the plan as plain values; the keys are part of the command's contract."""
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
            "expert": recipe.model.expert_model_parallel_size,
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
