"""What to change when a plan does not fit: keys, and about how far each gets, best first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nemo_care.config import needs_reference
from nemo_care.errors import InputError
from nemo_care.models.qwen2_5_vl import check_layout
from nemo_care.parallel.process_groups import Layout
from nemo_care.planning.gpus import GIB
from nemo_care.planning.plan import GRANULARITIES, Plan, StagePlan

Peaks = dict[str, float]
# A change that leaves more of the peak than this is not worth a line.
_WORTH = 0.97


@dataclass(frozen=True)
class _Change:
    """Overrides, what they cost, and the peaks of a stage under them."""

    overrides: str
    cost: str
    peaks: Callable[[StagePlan], Peaks]


def remedies(plan: Plan) -> list[str]:
    """One line per change that lowers the largest peak; those that suffice alone come first."""
    if plan.fits:
        return []
    found = []
    for order, change in enumerate(_changes(plan)):
        peak = max(max(change.peaks(stage).values()) for stage in plan.stages)
        if peak - plan.allowance < _WORTH * (plan.worst.peak - plan.allowance):
            too_much = peak > plan.question.budget
            found.append((too_much, peak if too_much else order, peak, change))
    return [
        f"{change.overrides} ({change.cost}): about {peak / GIB:.0f} GiB at the peak"
        + (", still too much alone" if too_much else "")
        for too_much, _, peak, change in sorted(found, key=lambda item: item[:2])
    ]


def _changes(plan: Plan) -> Iterator[_Change]:
    """All changes that are possible, the cheapest first."""
    recipe = plan.recipe
    algorithm, model, data = recipe.algorithm, recipe.model, recipe.data
    if (samples := recipe.evaluation.samples_per_batch) > 1:
        yield _Change(
            "evaluation.samples_per_batch=1",
            "slower validation",
            _scaled(plan, {"validation": 1 / samples}),
        )
    if (groups := recipe.rollout.groups_per_batch) > 1:
        yield _Change(
            "rollout.groups_per_batch=1", "slower rollout", _scaled(plan, {"rollout": 1 / groups})
        )
    if (groups := algorithm.groups_per_micro_batch) > 1:
        factors = {"scoring": 1 / groups, "update": 1 / groups}
        yield _Change(
            "algorithm.groups_per_micro_batch=1", "smaller kernels", _scaled(plan, factors)
        )
    if needs_reference(recipe.algorithm) and not algorithm.reference.offload:
        yield _Change(
            "algorithm.reference.offload=true",
            "some seconds per step, and CPU memory",
            _without_reference,
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
        if layout.tensor > trainer.devices or not _divides(plan, layout):
            continue
        if world % ranks == 0:
            yield _Change(overrides, cost, _halved(plan))
        elif 2 * world % ranks == 0:
            yield _Change(f"{more} {overrides}", "twice the machines", _halved(plan))
    if recipe.algorithm.prompts_per_step % (2 * world // (tensor * pipeline)) == 0:
        offload = recipe.optimizer.offload
        change = _half_the_step if offload else _half_the_optimizer
        yield _Change(more, "twice the machines", change)


def _divides(plan: Plan, layout: Layout) -> bool:
    try:
        check_layout(plan.shape.hf, layout)
    except InputError:
        return False
    return True


def _scaled(plan: Plan, factors: dict[str, float]) -> Callable[[StagePlan], Peaks]:
    """What a phase needs on top of what is held, times a factor."""

    def peaks(stage: StagePlan) -> Peaks:
        fixed = stage.held + plan.allowance
        scaled = {
            phase: fixed + (peak - fixed) * factors.get(phase, 1.0)
            for phase, peak in stage.peaks.items()
        }
        # The optimizer's step takes the same with any lengths.
        step = fixed + stage.use.optimizer_step
        return {**scaled, "update": max(scaled["update"], step)}

    return peaks


def _without_reference(stage: StagePlan) -> Peaks:
    """The float32 average leaves the GPU; the copy that scores is there while scoring."""
    build = stage.build
    gone = dict.fromkeys(stage.peaks, build.reference_average + build.reference_weights)
    gone["scoring"] = build.reference_average
    return {phase: peak - gone[phase] for phase, peak in stage.peaks.items()}


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
    """Twice as many ranks hold the model; the vision tower is not cut."""

    def peaks(stage: StagePlan) -> Peaks:
        vision = stage.use.vision * stage.in_flight
        kept = {"update": vision + plan.allowance}
        return {
            phase: (peak - whole) / 2 + whole
            for phase, peak in stage.peaks.items()
            for whole in (kept.get(phase, plan.allowance),)
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
