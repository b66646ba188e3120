"""A recipe's plans with each way to sample, side by side: time, memory, and which is fastest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from nemo_care.errors import InputError
from nemo_care.planning.gpus import gib
from nemo_care.planning.measured import Measurements
from nemo_care.planning.plan import Plan, Question, make_plan
from nemo_care.planning.shapes import read_model_shape
from nemo_care.planning.tables import markdown_table
from nemo_care.recipe.schema import Recipe

_PHASES = ("rollout", "scoring", "update")


@dataclass(frozen=True)
class RolloutPlans:
    """The plans by name, and why there is none; `chosen` is the recipe's own choice, if any."""

    plans: Mapping[str, Plan]
    refused: Mapping[str, str]
    chosen: str | None

    @property
    def fastest(self) -> str | None:
        """The fastest that fits, except asynchronous ones, which train on older completions."""
        fitting = {
            name: plan.seconds.total
            for name, plan in self.plans.items()
            if plan.fits and not plan.seconds.asynchronous
        }
        return min(fitting, key=lambda name: fitting[name], default=None)


def compare_rollouts(
    recipes: Mapping[str, Recipe | InputError], chosen: str | None, question: Question
) -> RolloutPlans:
    """Plan variants of one recipe that differ in how they sample, by name.

    An error in the place of a recipe is the reason why there is none.
    """
    plans, refused = {}, {}
    measured: Measurements | None = None
    for name, recipe in recipes.items():
        try:
            if isinstance(recipe, InputError):
                raise recipe
            measured = measured or Measurements(read_model_shape(recipe.model.hf_path))
            plans[name] = make_plan(recipe, question, compare=False, measured=measured)
        except InputError as error:
            refused[name] = str(error)
    return RolloutPlans(plans, refused, chosen)


def engine_gpus(plan: Plan) -> int:
    """Return the number of GPUs that only sample."""
    engine = plan.engine
    if engine is None or engine.placement == "colocated":
        return 0
    return engine.engines * engine.tensor_parallel_size


def comparison_as_json(found: RolloutPlans) -> dict[str, Any]:
    """Return the comparison as plain values; the keys are part of the command's contract."""
    return {
        "plans": {
            name: {
                "training_gpus": _training_gpus(plan),
                "engine_gpus": engine_gpus(plan),
                "seconds": plan.seconds.as_json(),
                "shares": {phase: plan.seconds.share(phase) for phase in _PHASES},
                "peak_bytes": plan.worst.peak,
                "engine": plan.engine.as_json() if plan.engine is not None else None,
                "host_bytes": sum(plan.host.values()),
                "fits": plan.fits,
            }
            for name, plan in found.plans.items()
        },
        "refused": dict(found.refused),
        "chosen": found.chosen,
        "fastest": found.fastest,
    }


def comparison_report(found: RolloutPlans) -> RenderableType:
    """Report the comparison as a table, with the reasons for missing rows."""
    table = markdown_table(
        [
            "rollout",
            "training GPUs",
            "engine GPUs",
            *(f"{phase}, s" for phase in _PHASES),
            "step, s",
            "peak, GiB",
            "engine, GiB",
            "CPU, GiB",
            "fits",
        ]
    )
    for name, plan in found.plans.items():
        seconds = plan.seconds
        table.add_row(
            f"{'*' if name == found.chosen else ''}{name}",
            str(_training_gpus(plan)),
            str(engine_gpus(plan) or "–"),
            *(f"{seconds.as_json()[p]:.2f} ({seconds.share(p):.0%})" for p in _PHASES),
            f"{seconds.total:.2f}",
            gib(plan.worst.peak),
            gib(plan.engine.share if plan.engine is not None else 0),
            gib(sum(plan.host.values())),
            "yes" if plan.fits else "NO",
        )
    return Group(
        Text("One step by rollout, * the recipe's own: seconds and share of the step by phase;"),
        Text("memory of a training GPU at its peak, of an engine's GPU, and of a machine's CPUs"),
        table,
        *(Text(f"{name}: {reason}") for name, reason in found.refused.items()),
        Text(_conclusion(found)),
    )


def _conclusion(found: RolloutPlans) -> str:
    fastest = found.fastest
    if fastest is None:
        return "None of them fits: nemo-care plan with rollout=NAME says what helps."
    return (
        f"The fastest that fits is {fastest}, asynchronous ones apart: these hide sampling behind "
        "training, and train on older completions. Times are estimates."
    )


def _training_gpus(plan: Plan) -> int:
    return plan.recipe.trainer.devices * plan.recipe.trainer.num_nodes
