"""Run one step of every stage in a fake world; report communication and checkpoint entries."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_care.checkpoints.store import sharding_metadata
from nemo_care.errors import InputError
from nemo_care.planning.advice import remedies
from nemo_care.planning.counts import in_flight
from nemo_care.planning.gpus import GIB
from nemo_care.planning.plan import Plan
from nemo_care.planning.stage import Stage, built_stage
from nemo_care.planning.tables import markdown_table
from nemo_care.recipe.schema import Recipe

# torch's operators: a description, and which argument holds the data that is sent or received.
_OPERATORS = {
    "send": ("send to a neighbour", 0),
    "recv_": ("receive from a neighbour", 0),
    "broadcast_": ("broadcast", 0),
    "allreduce_": ("all-reduce", 0),
    "_allgather_base_": ("all-gather", 0),
    "allgather_": ("all-gather", 0),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "alltoall_base_": ("all-to-all", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
}


class _Communication(TorchDispatchMode):
    """Counts calls and bytes (of the whole tensor) of collectives, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            kind, place = _OPERATORS.get(name, (name, 0))
            tensors = [leaf for leaf in tree_leaves(args[place]) if isinstance(leaf, torch.Tensor)]
            self.calls[kind] += 1
            self.bytes[kind] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class StageRun:
    """Calls and bytes of one stage's rank in each phase, by kind of collective."""

    stage: int
    rank: int
    calls: dict[str, dict[str, int]] = field(default_factory=dict)
    bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    checkpoint_entries: int = 0


def dry_run(plan: Plan) -> list[StageRun]:
    """Run a step of one rank of every stage.

    Raises:
        InputError: the plan does not fit its GPU.
    """
    if not plan.fits:
        if plan.stages_fit and plan.engine is not None:
            raise InputError(plan.engine.problem)
        worst, budget = plan.worst, plan.question.budget
        advice = remedies(plan)
        raise InputError(
            f"stage {worst.stage} needs {worst.peak / GIB:.0f} GiB in {worst.peak_phase}, a "
            f"{plan.question.gpu.name} has {budget / GIB:.0f} GiB with the margin: "
            + (f"set {advice[0]}" if advice else "no single change is enough, try --search")
        )
    runs = []
    for number in range(plan.recipe.model.pipeline_model_parallel_size):
        with built_stage(plan.recipe, plan.shape, number) as stage:
            runs.append(_run(stage, number, plan))
    return runs


def _run(stage: Stage, number: int, plan: Plan) -> StageRun:
    recipe: Recipe = plan.recipe
    # As many micro-batches as the first stage holds at a time: after that the schedule repeats.
    count = in_flight(recipe, 0)
    phases: dict[str, Callable[[], Any]] = {
        "rollout": lambda: stage.generate(plan.longest, 1, recipe.algorithm.group_size),
        "scoring": lambda: stage.score(plan.longest),
        "update": lambda: stage.update(plan.longest, count),
    }
    if plan.engine is not None:
        # The training ranks do not sample.
        del phases["rollout"]
    run = StageRun(number, stage.ranks.rank, checkpoint_entries=_checkpoint_entries(stage))
    for phase, work in phases.items():
        with _Communication() as seen:
            work()
        run.calls[phase], run.bytes[phase] = dict(seen.calls), dict(seen.bytes)
    return run


def _checkpoint_entries(stage: Stage) -> int:
    """Cut the stage's state into checkpoint entries, as loading does, and return their number.

    Megatron checks every entry's shape, offset and rank placement while creating it.
    """
    metadata = sharding_metadata()
    state = {"policy": stage.policy.sharded_state_dict(metadata, is_loading=True)}
    if stage.reference is not None:
        state["reference"] = stage.reference.sharded_state_dict(metadata)
    return len(tree_leaves(state))


def dry_run_report(plan: Plan, runs: list[StageRun]) -> RenderableType:
    """Report what each stage's rank sent and received, by phase."""
    kinds = sorted({kind for run in runs for calls in run.calls.values() for kind in calls})
    table = markdown_table(["stage", "rank", "phase", *kinds])
    for run in runs:
        for phase, calls in run.calls.items():
            cells = [_cell(calls.get(kind, 0), run.bytes[phase].get(kind, 0)) for kind in kinds]
            table.add_row(str(run.stage), str(run.rank), phase, *cells)
    entries = sum(run.checkpoint_entries for run in runs)
    count = in_flight(plan.recipe, 0)
    rollout = "Rollout: one group's prompt and one token; " if plan.engine is None else ""
    return Group(
        Text(
            "Dry run of one rank of each stage, in a fake world: calls and GiB of the tensors. "
            f"{rollout}scoring: one micro-batch; update: {count}"
        ),
        table,
        Text(
            f"checkpoint: {entries} entries of these ranks fit together\n"
            "The step runs through on every stage. Nothing was sent, and nothing ran on a GPU."
        ),
    )


def _cell(calls: int, size: int) -> str:
    return f"{calls} ({size / GIB:.2f})" if calls else "–"
