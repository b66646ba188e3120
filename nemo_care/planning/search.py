"""Search the layouts of a recipe that fit a number of GPUs, fastest first."""

import itertools
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from nemo_care.errors import InputError
from nemo_care.models.architecture import Architecture
from nemo_care.planning.counts import in_flight, prompts_of
from nemo_care.planning.engines import EnginePlan, beside
from nemo_care.planning.gpus import Gpu, gib
from nemo_care.planning.measured import Measurements
from nemo_care.planning.plan import (
    GRANULARITIES,
    Question,
    allowance_of,
    check_plannable,
    phase_peaks,
    planned_engine,
)
from nemo_care.planning.shapes import ModelShape, longest_lengths, read_model_shape, typical_lengths
from nemo_care.planning.stage import StageBuild, built_stage
from nemo_care.planning.tables import markdown_table
from nemo_care.planning.work import Clock, StepTime
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.model import expert_tensor_size
from nemo_care.recipe.rollout import RolloutConfig
from nemo_care.recipe.schema import Recipe, check_recipe, needs_reference, replicas_of

_GROUPS = (1, 2, 4)


@dataclass(frozen=True)
class Found:
    """A layout that fits: the recipe with it, its largest peak in bytes, its estimated time."""

    recipe: Recipe
    peak: int
    phase: str
    seconds: StepTime

    @property
    def overrides(self) -> str:
        """The overrides to add to the command line."""
        return " ".join(f"{key}={value}" for key, value in _keys(self.recipe).items())


def _keys(recipe: Recipe) -> dict[str, str]:
    model, algorithm = recipe.model, recipe.algorithm
    experts = {}
    if model.expert_model_parallel_size > 1:
        experts["model.expert_model_parallel_size"] = str(model.expert_model_parallel_size)
    if model.expert_tensor_parallel_size is not None:
        experts["model.expert_tensor_parallel_size"] = str(model.expert_tensor_parallel_size)
    return {
        "trainer.num_nodes": str(recipe.trainer.num_nodes),
        "trainer.devices": str(recipe.trainer.devices),
        "model.tensor_model_parallel_size": str(model.tensor_model_parallel_size),
        "model.pipeline_model_parallel_size": str(model.pipeline_model_parallel_size),
        **experts,
        "model.sequence_parallel": str(model.sequence_parallel).lower(),
        "model.recompute_granularity": model.recompute_granularity,
        "algorithm.reference.offload": str(algorithm.reference.offload).lower(),
        "algorithm.groups_per_micro_batch": str(algorithm.groups_per_micro_batch),
        "optimizer.offload": str(recipe.optimizer.offload).lower(),
    }


def _offloaded(recipe: Recipe) -> str:
    """Name what is offloaded to CPU memory."""
    waiting = {
        "reference": recipe.algorithm.reference.offload,
        "optimizer": recipe.optimizer.offload,
    }
    return " and ".join(name for name, offload in waiting.items() if offload) or "nothing"


@dataclass
class _Candidate:
    recipe: Recipe
    engine: EnginePlan | None
    seconds: StepTime


def search(
    recipe: Recipe,
    question: Question,
    gpus: int | None,
    limit: int,
    tell: Callable[[str], None],
) -> list[Found]:
    """Return the fastest variant of each TP, PP, EP and ETP that fits, at most `limit` of them.

    Every layout in the result was built and its phases run, as `make_plan` does. `tell` receives a
    line for each layout that is tried.

    Raises:
        InputError: an unusable number of GPUs.
    """
    shape = read_model_shape(recipe.model.hf_path)
    machines, devices = _machines(recipe, gpus)
    typical = typical_lengths(
        recipe, shape.family, question.prompt_tokens, question.completion_tokens
    )
    vision = _VisionBytes(recipe, shape)
    measured = Measurements(shape)
    candidates = []
    for layout in _layouts(recipe, shape, machines, devices, question.gpu):
        builds = measured.builds(layout)
        engine = planned_engine(layout, measured, question)
        if engine is not None and not engine.fits:
            # The same in every layout.
            tell(engine.problem)
            return []
        for variant in _variants(layout):
            if _least(variant, builds, vision, engine) > question.budget:
                continue
            clock = Clock(variant, shape.family, typical, question.gpu, question.efficiency)
            candidates.append(_Candidate(variant, engine, clock.step(builds)))
    found: dict[Layout, Found] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.seconds.total):
        key = Layout.of(candidate.recipe)
        if key in found:
            continue
        peak, phase = _largest(candidate.recipe, measured, candidate.engine, question.budget)
        fits = peak <= question.budget
        keys = _keys(candidate.recipe)
        shared = f" EP {key.expert} ETP {key.expert_tensor_size}" if key.expert > 1 else ""
        tell(
            f"TP {key.tensor} PP {key.pipeline}{shared} {keys['model.recompute_granularity']}, "
            f"{keys['algorithm.groups_per_micro_batch']} group(s), offload "
            f"{_offloaded(candidate.recipe)}: {gib(peak)} GiB in {phase}"
            f"{'' if fits else ', does not fit'}"
        )
        if fits:
            found[key] = Found(candidate.recipe, peak, phase, candidate.seconds)
        if len(found) == limit:
            break
    return list(found.values())


def _machines(recipe: Recipe, gpus: int | None) -> tuple[int, int]:
    """Return the number of machines and of GPUs of each."""
    devices = recipe.trainer.devices
    if gpus is None:
        return recipe.trainer.num_nodes, devices
    if gpus < 1 or (gpus > devices and gpus % devices):
        raise InputError(
            f"--gpus {gpus}: must be a multiple of trainer.devices={devices}, the GPUs of a machine"
        )
    return max(gpus // devices, 1), min(gpus, devices)


def _layouts(
    recipe: Recipe, shape: ModelShape, machines: int, devices: int, gpu: Gpu
) -> Iterator[Recipe]:
    """Yield the recipe in every possible layout; tensor parallelism stays within a machine."""
    world = machines * devices
    sizes = range(1, devices + 1), range(1, world + 1), _expert_sizes(shape, world)
    for tensor, pipeline, (expert, expert_tensor) in itertools.product(*sizes):
        if world % (tensor * pipeline):
            continue
        changed = deepcopy(recipe)
        changed.trainer.num_nodes, changed.trainer.devices = machines, devices
        changed.model.tensor_model_parallel_size = tensor
        changed.model.pipeline_model_parallel_size = pipeline
        changed.model.expert_model_parallel_size = expert
        changed.model.expert_tensor_parallel_size = expert_tensor
        changed.model.sequence_parallel = tensor > 1
        try:
            check_recipe(changed)
            check_plannable(changed, shape, gpu)
        except InputError:
            continue
        if _expert_bytes(shape.architecture, changed) > gpu.memory:
            continue
        if changed.algorithm.prompts_per_step % replicas_of(changed):
            continue
        yield changed


def _expert_sizes(shape: ModelShape, world: int) -> Iterator[tuple[int, int | None]]:
    """Yield the numbers of ranks over which experts, and each one's matrices, can be distributed.

    Matrices are distributed (otherwise None) only over ranks for which there are not enough
    experts: to distribute experts needs no more memory, and fewer bytes are sent.
    """
    yield 1, None
    if shape.architecture.experts is None:
        return
    count = shape.architecture.experts.count
    for ranks in range(2, world + 1):
        if world % ranks == 0:
            expert = math.gcd(count, ranks)
            if expert > 1:
                yield expert, ranks // expert if ranks > expert else None


def _expert_bytes(model: Architecture, recipe: Recipe) -> int:
    """Return the bytes of a rank's experts at least, which saves building them: weights, gradients,
    and the rank's share of the optimizer's state."""
    if model.experts is None:
        return 0
    layout = Layout.of(recipe)
    layers = model.layers // layout.pipeline
    ranks = layout.expert * layout.expert_tensor_size
    numbers = 3 * model.hidden_size * model.ffn_size * model.experts.count * layers // ranks
    same = recipe.trainer.devices * recipe.trainer.num_nodes // (ranks * layout.pipeline)
    return 6 * numbers + 12 * numbers // max(same, 1)


def _variants(recipe: Recipe) -> Iterator[Recipe]:
    """Yield the layout with each recomputation, micro-batch size and offloading."""
    offloads = (False, True) if needs_reference(recipe.algorithm) else (False,)
    groups = [count for count in _GROUPS if prompts_of(recipe) % count == 0]
    switches = itertools.product(GRANULARITIES, offloads, groups, (False, True))
    for granularity, offload, count, optimizer_offload in switches:
        changed = deepcopy(recipe)
        changed.optimizer.offload = optimizer_offload
        changed.model.recompute_granularity = granularity
        changed.algorithm.reference.offload = offload
        changed.algorithm.groups_per_micro_batch = count
        yield changed


def _least(
    recipe: Recipe,
    builds: list[StageBuild],
    vision: "_VisionBytes",
    engine: EnginePlan | None,
) -> int:
    """Return a lower bound of the largest peak, which saves measuring layouts that can't fit."""
    held = [build.held(recipe) for build in builds]
    steps = [
        size + (build.optimizer if recipe.optimizer.offload else 0)
        for size, build in zip(held, builds, strict=True)
    ]
    activations = vision.bytes(recipe) * in_flight(recipe, 0)
    update = max(*steps, held[0] + activations) + beside(engine, "update")
    return max(update, max(held) + beside(engine, "rollout")) + allowance_of(recipe)


class _VisionBytes:
    """Memory that the vision tower needs at least on the first stage, for one group."""

    def __init__(self, recipe: Recipe, shape: ModelShape) -> None:
        self.recipe = recipe
        self.shape = shape
        self.found: dict[str, int] = {}

    def bytes(self, recipe: Recipe) -> int:
        """Return the bytes of one micro-batch on the rank that keeps most."""
        granularity = recipe.model.recompute_granularity
        if granularity not in self.found:
            alone = deepcopy(self.recipe)
            alone.trainer.num_nodes = alone.trainer.devices = 1
            alone.model.tensor_model_parallel_size = alone.model.pipeline_model_parallel_size = 1
            alone.model.expert_model_parallel_size = 1
            alone.model.expert_tensor_parallel_size = None
            alone.model.sequence_parallel = False
            alone.model.recompute_granularity = granularity
            alone.algorithm.groups_per_micro_batch = 1
            lengths = longest_lengths(alone, self.shape.family)
            with built_stage(alone, self.shape, 0, reference=False) as stage:
                self.found[granularity] = stage.activations(lengths)[1]
        ranks = recipe.model.tensor_model_parallel_size if recipe.model.vision.shard else 1
        return self.found[granularity] * recipe.algorithm.groups_per_micro_batch // ranks


def _largest(
    recipe: Recipe, measured: Measurements, engine: EnginePlan | None, budget: int
) -> tuple[int, str]:
    """Return the largest peak of all stages and its phase, or the first above the budget."""
    count = recipe.model.pipeline_model_parallel_size
    largest = (0, "")
    # Of the stages between the first and the last, the second has the most in flight.
    for number in sorted({0, min(1, count - 1), count - 1}):
        for phase, peak in phase_peaks(recipe, measured, number, engine):
            largest = max(largest, (peak, phase))
            if peak > budget:
                return largest
    return largest


def search_report(
    found: list[Found], question: Question, gpus: int, rollout: RolloutConfig
) -> RenderableType:
    """Format the layouts as a table, with the overrides of the best."""
    if not found:
        return Text(
            f"No layout fits {gpus} x {question.gpu.name}: more GPUs, a smaller "
            f"data.max_prompt_tokens{_hint(rollout)} help"
        )
    shared = any(item.recipe.model.expert_model_parallel_size > 1 for item in found)
    columns = ["TP", "PP", *(["EP", "ETP"] if shared else []), "DP", "recomputation", "offload"]
    times = (f"{phase} s" for phase in found[0].seconds.as_json())
    table = markdown_table([*columns, "groups", "peak GiB", "in", *times])
    for item in found:
        model, algorithm = item.recipe.model, item.recipe.algorithm
        experts = (model.expert_model_parallel_size, expert_tensor_size(model))
        table.add_row(
            str(model.tensor_model_parallel_size),
            str(model.pipeline_model_parallel_size),
            *(map(str, experts) if shared else ()),
            str(replicas_of(item.recipe)),
            model.recompute_granularity,
            _offloaded(item.recipe),
            str(algorithm.groups_per_micro_batch),
            gib(item.peak),
            item.phase,
            *(f"{value:.1f}" for value in item.seconds.as_json().values()),
        )
    return Group(
        Text(
            f"Layouts that fit {gpus} x {question.gpu.name} ({gib(question.budget)} GiB each with "
            "the margin), fastest estimate first; groups are per micro-batch"
        ),
        table,
        Text(f"the first one: {found[0].overrides}"),
    )


def _hint(rollout: RolloutConfig) -> str:
    """Return further remedies, which depend on the rollout backend."""
    if rollout.backend == "megatron":
        return ", rollout.groups_per_batch=1 or evaluation.samples_per_batch=1"
    size = "a larger rollout.vllm.tensor_parallel_size"
    if rollout.vllm.placement == "separate":
        return f" or {size}"
    return f", another rollout.vllm.gpu_memory_utilization or {size}"


def search_as_json(found: list[Found]) -> list[dict]:
    """Return the same as plain values."""
    return [
        {
            "overrides": _keys(item.recipe),
            "peak_bytes": item.peak,
            "peak_phase": item.phase,
            "seconds": item.seconds.total,
        }
        for item in found
    ]
