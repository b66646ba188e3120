"""What to change when a plan does not fit: keys, and about how far each gets, best first."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from math import floor
from typing import Any

from nemo_care.errors import InputError
from nemo_care.models.qwen2_5_vl import check_layout
from nemo_care.planning.engines import EnginePlan, beside, engine_plan
from nemo_care.planning.gpus import GIB
from nemo_care.planning.plan import GRANULARITIES, Plan, StagePlan
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.schema import needs_reference
from nemo_care.recipe.vllm import check_vllm
from nemo_care.rollouts.build import check_engines

Peaks = dict[str, float]
# A change that leaves more of the peak than this is not worth a line.
_WORTH = 0.97
# An engine's ranks are on one machine.
_MOST_GPUS = 16
_KEY = "rollout.vllm"


@dataclass(frozen=True)
class _Change:
    """Overrides, what they cost, and the peaks of a stage under them."""

    overrides: str
    cost: str
    peaks: Callable[[StagePlan], Peaks]


def remedies(plan: Plan) -> list[str]:
    """One line per change that lowers the largest peak; those that suffice alone come first."""
    if plan.stages_fit:
        return [] if plan.fits else _of_the_engine(plan)
    found = []
    for order, change in enumerate(_changes(plan)):
        peak = max(max(change.peaks(stage).values()) for stage in plan.stages)
        too_much = peak > plan.question.budget
        less = peak - plan.allowance < _WORTH * (plan.worst.peak - plan.allowance)
        if less or not too_much:
            found.append((too_much, peak if too_much else order, peak, change))
    return _of_the_engine(plan) + [
        f"{change.overrides} ({change.cost}): about {peak / GIB:.0f} GiB at the peak"
        + (", still too much alone" if too_much else "")
        for too_much, _, peak, change in sorted(found, key=lambda item: item[:2])
    ]


def _changes(plan: Plan) -> Iterator[_Change]:
    """All changes that are possible, the cheapest first."""
    recipe = plan.recipe
    algorithm, model, data = recipe.algorithm, recipe.model, recipe.data
    ranks_sample = plan.engine is None
    if ranks_sample and (samples := recipe.evaluation.samples_per_batch) > 1:
        yield _Change(
            "evaluation.samples_per_batch=1",
            "slower validation",
            _scaled(plan, {"validation": 1 / samples}),
        )
    if ranks_sample and (groups := recipe.rollout.groups_per_batch) > 1:
        yield _Change(
            "rollout.groups_per_batch=1", "slower rollout", _scaled(plan, {"rollout": 1 / groups})
        )
    if (groups := algorithm.groups_per_micro_batch) > 1:
        factors = {"scoring": 1 / groups, "update": 1 / groups}
        if not ranks_sample:
            # Then a validation's peak is that of a scoring pass.
            factors["validation"] = 1 / groups
        yield _Change(
            "algorithm.groups_per_micro_batch=1", "smaller kernels", _scaled(plan, factors)
        )
    yield from _smaller_engines(plan)
    if needs_reference(recipe.algorithm) and not algorithm.reference.offload:
        yield _Change(
            "algorithm.reference.offload=true",
            "some seconds per step, and CPU memory",
            _without_reference(plan),
        )
    if not recipe.optimizer.offload:
        yield _Change(
            "optimizer.offload=true",
            "some seconds per step, and CPU memory",
            _without_optimizer,
        )
    stronger = GRANULARITIES[GRANULARITIES.index(model.recompute_granularity) + 1 :]
    for granularity in stronger:
        cost = "a third" if granularity == "full" else "a little"
        if all(granularity in stage.update_by_recomputation for stage in plan.stages):
            yield _Change(
                f"model.recompute_granularity={granularity}",
                f"{cost} more time in the update",
                _recomputing(granularity),
            )
    yield from _layouts(plan)
    if data.max_prompt_tokens > plan.typical.prompt:
        shorter = max(data.max_prompt_tokens // 2, plan.typical.prompt)
        share = shorter / data.max_prompt_tokens
        factors = dict.fromkeys(("rollout", "validation", "scoring", "update"), share)
        yield _Change(
            f"data.max_prompt_tokens={shorter}",
            "longer prompts are skipped",
            _scaled(plan, factors),
        )


def _layouts(plan: Plan) -> Iterator[_Change]:
    """The model cut further, on the same machines and on twice as many."""
    recipe = plan.recipe
    model, trainer = recipe.model, recipe.trainer
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    world = trainer.devices * trainer.num_nodes
    sequence = "" if model.sequence_parallel else " model.sequence_parallel=true"
    candidates = [
        (
            f"model.tensor_model_parallel_size={2 * tensor}{sequence}",
            "more communication",
            Layout(2 * tensor, pipeline),
        ),
        (
            f"model.pipeline_model_parallel_size={2 * pipeline}",
            "a longer pipeline",
            Layout(tensor, 2 * pipeline),
        ),
    ]
    more = f"trainer.num_nodes={2 * trainer.num_nodes}"
    for overrides, cost, layout in candidates:
        ranks = layout.tensor * layout.pipeline
        if layout.tensor > trainer.devices:
            continue
        if world % ranks == 0 and _divides(plan, layout, 1):
            yield _Change(overrides, cost, _halved(plan))
        elif world % ranks and 2 * world % ranks == 0 and _divides(plan, layout, 2):
            yield _Change(f"{more} {overrides}", "twice the machines", _halved(plan))
    whole = recipe.algorithm.prompts_per_step % (2 * world // (tensor * pipeline)) == 0
    if whole and _divides(plan, Layout.of(recipe), 2):
        offload = recipe.optimizer.offload
        change = _half_the_step if offload else _half_the_optimizer
        yield _Change(more, "twice the machines", change)


def _smaller_engines(plan: Plan) -> Iterator[_Change]:
    """What makes room on GPUs that engines share with training."""
    engine, recipe = plan.engine, plan.recipe
    if engine is None or engine.placement != "colocated":
        return
    if recipe.rollout.vllm.sleep_level == 0:
        asleep = _engine_with(plan, sleep_level=2)
        yield _Change(
            f"{_KEY}.sleep_level=2", "weights sent anew each step", _exchanged(plan, asleep)
        )
    share = _largest_share(plan)
    if share is not None and share < engine.gpu_memory_utilization:
        smaller = _engine_with(plan, gpu_memory_utilization=share)
        yield _Change(
            f"{_KEY}.gpu_memory_utilization={share:g}",
            f"the cache then holds {smaller.cache_tokens} tokens instead of {engine.cache_tokens}",
            _exchanged(plan, smaller),
        )


def _largest_share(plan: Plan) -> float | None:
    """The largest gpu_memory_utilization, of two digits, with which training leaves engines their
    share, and with which they can work."""
    engine, memory = plan.engine, plan.question.gpu.memory
    assert engine is not None, "asked where vLLM samples"
    if engine.placement == "separate":
        room = plan.question.budget
    else:
        room = plan.question.budget - max(
            peak - engine.share
            for stage in plan.stages
            for phase, peak in stage.peaks.items()
            if beside(engine, phase) >= engine.share
        )
    # A share is cut to whole bytes, so less than one byte more is no more.
    share = floor(100 * (room + 1) / memory) / 100
    if share <= 0:
        return None
    other = _engine_with(plan, gpu_memory_utilization=share)
    # With kv_cache_gib the engine may take more than its share.
    return share if other.fits and other.share <= room else None


def _engine_with(plan: Plan, **keys: Any) -> EnginePlan:
    """The plan's engine with other values of keys under rollout.vllm.

    Raises:
        InputError: there can't be such engines.
    """
    changed = deepcopy(plan.recipe)
    for key, value in keys.items():
        setattr(changed.rollout.vllm, key, value)
    check_vllm(changed.rollout.vllm)
    check_engines(changed, plan.shape.hf)
    engine = engine_plan(changed, plan.shape.hf, plan.parameters, plan.question.gpu)
    assert engine is not None, "asked where vLLM samples"
    return engine


def _exchanged(plan: Plan, engine: EnginePlan) -> Callable[[StagePlan], Peaks]:
    """Another engine in the place of the plan's."""
    return lambda stage: {
        phase: peak - beside(plan.engine, phase) + beside(engine, phase)
        for phase, peak in stage.peaks.items()
    }


def _of_the_engine(plan: Plan) -> list[str]:
    """A line per change with which an engine that has too little can work."""
    if plan.engine is None or plan.engine.fits:
        return []
    found = []
    share = _largest_share(plan)
    if share is not None and share > plan.engine.gpu_memory_utilization:
        other = _engine_with(plan, gpu_memory_utilization=share)
        found.append((f"gpu_memory_utilization={share:g}", other))
    for size in range(plan.engine.tensor_parallel_size + 1, _MOST_GPUS + 1):
        try:
            other = _engine_with(plan, tensor_parallel_size=size)
        except InputError:
            continue
        if other.fits:
            found.append((f"tensor_parallel_size={size}", other))
            break
    return [
        f"{_KEY}.{override}: an engine's cache then holds {engine.cache_tokens} tokens, "
        f"{engine.cache_sequences} full-length sequence(s)"
        for override, engine in found
    ]


def _divides(plan: Plan, layout: Layout, times: int) -> bool:
    """Whether model and engines can be laid out so on so many times the machines."""
    changed = deepcopy(plan.recipe)
    changed.trainer.num_nodes *= times
    changed.model.tensor_model_parallel_size = layout.tensor
    changed.model.pipeline_model_parallel_size = layout.pipeline
    try:
        check_layout(plan.shape.hf, layout)
        check_engines(changed, plan.shape.hf)
    except InputError:
        return False
    return True


def _scaled(plan: Plan, factors: dict[str, float]) -> Callable[[StagePlan], Peaks]:
    """What a phase needs on top of what is held, times a factor."""

    def peaks(stage: StagePlan) -> Peaks:
        held = stage.held + plan.allowance
        scaled = {
            phase: fixed + (peak - fixed) * factors.get(phase, 1.0)
            for phase, peak in stage.peaks.items()
            for fixed in (held + beside(plan.engine, phase),)
        }
        # The optimizer's step takes the same with any lengths.
        step = held + stage.use.optimizer_step + beside(plan.engine, "update")
        return {**scaled, "update": max(scaled["update"], step)}

    return peaks


def _without_reference(plan: Plan) -> Callable[[StagePlan], Peaks]:
    """The float32 average leaves the GPU; the copy that scores is there while scoring."""

    def peaks(stage: StagePlan) -> Peaks:
        build = stage.build
        gone = dict.fromkeys(stage.peaks, build.reference_average + build.reference_weights)
        gone["scoring"] = build.reference_average
        if plan.engine is not None:
            # What is counted of a validation is a scoring pass.
            gone["validation"] = build.reference_average
        return {phase: peak - gone[phase] for phase, peak in stage.peaks.items()}

    return peaks


def _without_optimizer(stage: StagePlan) -> Peaks:
    """The optimizer's state leaves the GPU, and is there while the optimizer steps."""
    state = stage.build.optimizer
    without = {phase: peak - state for phase, peak in stage.peaks.items()}
    return {**without, "update": without["update"] + _growth(stage, state)}


def _growth(stage: StagePlan, state: float) -> float:
    """How much the update's peak grows when the optimizer's step takes so much more."""
    passes, step = stage.use.passes_peak(stage.in_flight), stage.use.optimizer_step
    return max(passes, step + state) - max(passes, step)


def _recomputing(granularity: str) -> Callable[[StagePlan], Peaks]:
    return lambda stage: {**stage.peaks, "update": stage.update_by_recomputation[granularity]}


def _halved(plan: Plan) -> Callable[[StagePlan], Peaks]:
    """Twice as many ranks hold the model; the vision tower is not cut, nor an engine's share."""

    def peaks(stage: StagePlan) -> Peaks:
        vision = stage.use.vision * stage.in_flight
        kept = {"update": vision + plan.allowance}
        return {
            phase: (peak - whole) / 2 + whole
            for phase, peak in stage.peaks.items()
            for whole in (kept.get(phase, plan.allowance) + beside(plan.engine, phase),)
        }

    return peaks


def _half_the_optimizer(stage: StagePlan) -> Peaks:
    return {phase: peak - stage.build.optimizer / 2 for phase, peak in stage.peaks.items()}


def _half_the_step(stage: StagePlan) -> Peaks:
    """The same where the state is there in the step only."""
    return {
        **stage.peaks,
        "update": stage.peaks["update"] + _growth(stage, -stage.build.optimizer / 2),
    }
