"""Suggest changes when a plan does not fit: variants of the recipe, planned in the same way."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from nemo_care.errors import InputError
from nemo_care.planning.engines import beside
from nemo_care.planning.gpus import GIB
from nemo_care.planning.plan import (
    GRANULARITIES,
    Plan,
    check_plannable,
    make_plan,
    phase_peaks,
    planned_engine,
)
from nemo_care.recipe.schema import Recipe, check_recipe, needs_reference, replicas_of

# A change that leaves more of the peak than this is not suggested.
_WORTH = 0.97
# An engine's ranks are on one machine.
_MOST_GPUS = 16
_SHARE = "rollout.vllm.gpu_memory_utilization"
_ENGINE_SIZE = "rollout.vllm.tensor_parallel_size"


@dataclass(frozen=True)
class _Change:
    """New values of keys, and their cost besides the estimated time."""

    keys: dict[str, Any]
    cost: str = ""

    def __str__(self) -> str:
        """The change as written on the command line."""
        words = (f"{key}={_in_words(value)}" for key, value in self.keys.items())
        return " ".join(words)


def _in_words(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def remedies(plan: Plan) -> list[str]:
    """Return a line per change that lowers the largest peak, sufficient changes first."""
    if plan.fits:
        return []
    lines = _of_the_engine(plan)
    if plan.stages_fit:
        return lines
    found = []
    for order, change in enumerate(_changes(plan)):
        variant = _variant(plan, change.keys)
        if variant is None or not _is_worth_it(plan, variant):
            continue
        planned = make_plan(variant, plan.question, compare=False, measured=plan.measured)
        peak = planned.worst.peak
        if planned.stages_fit or _is_less(plan, peak):
            cost = f"; {change.cost}" if change.cost else ""
            line = f"{change} ({_outcome(plan, planned)}{cost})"
            line += "" if planned.stages_fit else ", not enough alone"
            found.append((not planned.stages_fit, order if planned.stages_fit else peak, line))
    return lines + [line for *_, line in sorted(found)]


def _outcome(plan: Plan, planned: Plan) -> str:
    before, after = plan.seconds.total, planned.seconds.total
    return (
        f"{planned.worst.peak / GIB:.1f} GiB at the peak, {after:.1f} s per step"
        f"{'' if f'{before:.1f}' == f'{after:.1f}' else f' instead of {before:.1f}'}"
    )


def _is_less(plan: Plan, peak: int) -> bool:
    return peak - plan.allowance < _WORTH * (plan.worst.peak - plan.allowance)


def _is_worth_it(plan: Plan, variant: Recipe) -> bool:
    """Whether the phase with the largest peak, on its stage, needs less; only that is measured."""
    last = plan.recipe.model.pipeline_model_parallel_size - 1
    stages = variant.model.pipeline_model_parallel_size
    number = stages - 1 if 0 < last == plan.worst.stage else min(plan.worst.stage, stages - 1)
    engine = planned_engine(variant, plan.measured, plan.question)
    for phase, peak in phase_peaks(variant, plan.measured, number, engine):
        if phase == plan.worst.peak_phase:
            return peak <= plan.question.budget or _is_less(plan, peak)
    return True


def _variant(plan: Plan, keys: dict[str, Any]) -> Recipe | None:
    """Return the plan's recipe with different values; None if they are invalid."""
    changed = deepcopy(plan.recipe)
    for key, value in keys.items():
        group, _, name = key.rpartition(".")
        setattr(attrgetter(group)(changed), name, value)
    try:
        check_recipe(changed)
        check_plannable(changed, plan.shape, plan.question.gpu)
    except InputError:
        return None
    return None if changed.algorithm.prompts_per_step % replicas_of(changed) else changed


def _changes(plan: Plan) -> Iterator[_Change]:
    """Yield all possible changes, cheapest first."""
    recipe = plan.recipe
    algorithm, model, data = recipe.algorithm, recipe.model, recipe.data
    if plan.engine is None:
        if recipe.evaluation.samples_per_batch > 1:
            yield _Change({"evaluation.samples_per_batch": 1}, "slower validation")
        if recipe.rollout.groups_per_batch > 1:
            yield _Change({"rollout.groups_per_batch": 1})
    if algorithm.groups_per_micro_batch > 1:
        yield _Change({"algorithm.groups_per_micro_batch": 1}, "smaller kernels")
    if plan.engine is not None and plan.engine.placement == "colocated":
        if recipe.rollout.vllm.sleep_level == 0:
            yield _Change({"rollout.vllm.sleep_level": 2})
        share = _largest_share(plan)
        if share is not None and share.engine is not None:
            tokens = f"{share.engine.cache_tokens} tokens instead of {plan.engine.cache_tokens}"
            value = share.engine.gpu_memory_utilization
            if value < plan.engine.gpu_memory_utilization:
                yield _Change({_SHARE: value}, f"the cache then holds {tokens}")
    if needs_reference(algorithm) and not algorithm.reference.offload:
        yield _Change({"algorithm.reference.offload": True}, "uses CPU memory")
    if not recipe.optimizer.offload:
        yield _Change({"optimizer.offload": True}, "uses CPU memory")
    for granularity in GRANULARITIES[GRANULARITIES.index(model.recompute_granularity) + 1 :]:
        yield _Change({"model.recompute_granularity": granularity})
    yield from _layouts(plan)
    if data.max_prompt_tokens > plan.typical.prompt:
        shorter = max(data.max_prompt_tokens // 2, plan.typical.prompt)
        yield _Change({"data.max_prompt_tokens": shorter}, "longer prompts are skipped")


def _layouts(plan: Plan) -> Iterator[_Change]:
    """Cut the model further, on the same machines or on twice as many."""
    model, trainer = plan.recipe.model, plan.recipe.trainer
    tensor, pipeline = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    twice = {"trainer.num_nodes": 2 * trainer.num_nodes}
    cuts: list[dict[str, Any]] = [{"model.pipeline_model_parallel_size": 2 * pipeline}]
    if 2 * tensor <= trainer.devices:
        sequence = {} if model.sequence_parallel else {"model.sequence_parallel": True}
        cuts.insert(0, {"model.tensor_model_parallel_size": 2 * tensor} | sequence)
    for keys in cuts:
        whole = trainer.devices * trainer.num_nodes % (2 * tensor * pipeline) == 0
        yield _Change(keys) if whole else _Change(twice | keys, "twice the machines")
    yield _Change(twice, "twice the machines")


def _largest_share(plan: Plan) -> Plan | None:
    """Return the plan with the largest gpu_memory_utilization (two digits) that leaves room for
    training and with which engines can work."""
    for percent in range(100, 0, -1):
        variant = _variant(plan, {_SHARE: percent / 100})
        if variant is None:
            continue
        planned = make_plan(variant, plan.question, compare=False, measured=plan.measured)
        engine, budget = planned.engine, plan.question.budget
        assert engine is not None, "only called where vLLM samples"
        awake = (
            peak
            for stage in planned.stages
            for phase, peak in stage.peaks.items()
            if beside(engine, phase) >= engine.share
        )
        if engine.fits and max([engine.share, *awake]) <= budget:
            return planned
    return None


def _of_the_engine(plan: Plan) -> list[str]:
    """Return a line per change with which an engine that has too little memory can work."""
    if plan.engine is None or plan.engine.fits:
        return []
    found = []
    share = _largest_share(plan)
    if share is not None and share.engine is not None:
        value = share.engine.gpu_memory_utilization
        if value > plan.engine.gpu_memory_utilization:
            found.append((f"{_SHARE}={value:g}", share.engine))
    for size in range(plan.engine.tensor_parallel_size + 1, _MOST_GPUS + 1):
        variant = _variant(plan, {_ENGINE_SIZE: size})
        engine = variant and planned_engine(variant, plan.measured, plan.question)
        if engine and engine.fits:
            found.append((f"{_ENGINE_SIZE}={size}", engine))
            break
    return [
        f"{override}: an engine's cache then holds {engine.cache_tokens} tokens, "
        f"{engine.cache_sequences} full-length sequence(s)"
        for override, engine in found
    ]
