"""Plans of recipes with rollouts by vLLM, from fake worlds in a separate process."""

import os
import sys
from unittest.mock import patch

from fake_worlds import shown
from made_shapes import plan_recipe

from nemo_care.checks.planned import planned
from nemo_care.errors import InputError
from nemo_care.planning.advice import remedies
from nemo_care.planning.dry_run import dry_run
from nemo_care.planning.gpus import read_gpu
from nemo_care.planning.measured import Measurements
from nemo_care.planning.plan import Plan, Question, make_plan, plan_as_json
from nemo_care.planning.rollouts import compare_rollouts, comparison_as_json, comparison_report
from nemo_care.planning.search import search, search_report
from nemo_care.planning.shapes import read_model_shape
from nemo_care.planning.tables import plan_report
from nemo_care.recipe.schema import RANGES, Recipe

# By name: the stages of a pipeline and the keys under rollout.vllm, None without engines.
PLANS: dict = {
    "megatron": (2, None),
    "level 2": (2, {"sleep_level": 2, "tensor_parallel_size": 2}),
    "level 1": (1, {"sleep_level": 1}),
    "level 0": (1, {"sleep_level": 0}),
    "separate": (2, {"placement": "separate", "gpus": [2, 3], "tensor_parallel_size": 2}),
    # Of 3 GiB less the margin, training and CUDA leave less than the share.
    "share too large": (1, {}),
    "share too small": (1, {"gpu_memory_utilization": 0.001}),
    "little for GPUs apart": (
        1,
        {"gpu_memory_utilization": 0.001, "placement": "separate", "gpus": [0, 1]},
    ),
    # CUDA takes all of this except the margin.
    "no share": (1, {}),
}
SMALLER_GPUS = {"share too large": 2.4, "no share": 1.11}


def recipe_of(folder: str, pipeline: int, keys: dict | None) -> Recipe:
    """Return a recipe of one replica, with a validation."""
    recipe = plan_recipe(folder, 1, pipeline)
    recipe.data.validation.annotations = {"L1": "nowhere.jsonl"}
    if keys is not None:
        recipe.rollout.backend = "vllm"
        recipe.rollout.groups_per_batch = 4
        for key, value in keys.items():
            setattr(recipe.rollout.vllm, key, value)
    return recipe


def made_plans(folder: str) -> dict[str, Plan]:
    """Return the plans by name; what they have in common is measured once."""
    found = {}
    measured = Measurements(read_model_shape(folder))
    for name, (pipeline, keys) in PLANS.items():
        question = Question(read_gpu("h100-80gb", SMALLER_GPUS.get(name, 8.0)))
        recipe = recipe_of(folder, pipeline, keys)
        found[name] = make_plan(recipe, question, compare=False, measured=measured)
    return found


def printed(plans: dict[str, Plan]) -> dict:
    """Return each plan's JSON and report, by name."""
    found = {}
    for name, plan in plans.items():
        advice = remedies(plan)
        found[name] = plan_as_json(plan, advice) | {"text": shown(plan_report(plan, advice))}
    return found


def without_reference(folder: str) -> dict:
    """Return the plan of a recipe that scores nothing in a step."""
    recipe = recipe_of(folder, 1, {})
    recipe.algorithm.consistency.bonus_coefficient = recipe.algorithm.kl_coefficient = 0.0
    plan = make_plan(recipe, Question(read_gpu("h100-80gb", 8.0)), compare=False)
    return plan_as_json(plan, [])


def searched(folder: str) -> dict:
    """Return results of searches, their plans, and the message if nothing fits."""
    recipe = recipe_of(folder, 1, {"tensor_parallel_size": 2})
    recipe.trainer.devices, recipe.algorithm.prompts_per_step = 2, 1
    question = Question(read_gpu("h100-80gb", 8.0), margin=0.0)
    lines: list[str] = []
    found = search(recipe, question, 2, 10, lines.append)
    anew = Measurements(read_model_shape(folder))
    again = [make_plan(item.recipe, question, compare=False, measured=anew) for item in found]
    recipe.rollout.vllm.gpu_memory_utilization = 0.01
    told: list[str] = []
    nothing = search(recipe, Question(read_gpu("h100-80gb", 0.5)), 2, 10, told.append)
    hint = search_report(nothing, question, 2, recipe.rollout)
    return {
        "found": [
            (item.peak, plan.worst.peak, item.seconds.total, plan.seconds.total, plan.fits)
            for item, plan in zip(found, again, strict=True)
        ],
        "nothing": len(nothing),
        "told": told,
        "hint": str(hint),
    }


def compared(folder: str) -> dict:
    """Return a comparison of rollouts and the same plans made separately, with its report."""
    keys = {
        "megatron": None,
        "vllm": {"sleep_level": 2},
        "vllm_async": {"placement": "separate", "gpus": [2, 3], "tensor_parallel_size": 2},
    }
    recipes = {name: recipe_of(folder, 1, of_name) for name, of_name in keys.items()}
    recipes["vllm_async"].rollout.asynchronous = True
    question = Question(read_gpu("h100-80gb", 8.0))
    alone = {
        name: plan_as_json(make_plan(recipe, question, compare=False), [])
        for name, recipe in recipes.items()
    }
    missing = InputError("this one can't be composed")
    found = compare_rollouts({**recipes, "missing": missing}, "vllm", question)
    return comparison_as_json(found) | {"alone": alone, "text": shown(comparison_report(found))}


def refusals(folder: str, plans: dict[str, Plan]) -> dict:
    """Return the line with which each plan or dry run is refused, by case."""
    question = Question(read_gpu("h100-80gb", 8.0))
    cases = {
        "layout": lambda: make_plan(recipe_of(folder, 1, {"tensor_parallel_size": 2}), question),
        "engine": lambda: dry_run(plans["share too small"]),
    }
    lines = {}
    for name, case in cases.items():
        try:
            case()
        except InputError as error:
            lines[name] = str(error)
    return lines


def doctors(folder: str) -> dict:
    """Return the doctor's report on a GPU of which a quarter is in use, and on a CPU."""

    def composed(arguments: list[str]) -> Recipe:
        return recipe_of(folder, 1, {})

    with patch("nemo_care.recipe.compose.compose_recipe", composed):
        return {"GPU": planned("9.0", 60.0, 80.0, []), "CPU": planned("", 10.0, 10.0, [])}


def engines_planned(folder: str) -> dict:
    """Return all results by subject, with the folder of a small model's shape."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The model is so small that the smallest share has room for many copies.
    RANGES["rollout.vllm.gpu_memory_utilization"] = (0.001, 1.0)
    plans = made_plans(folder)
    (run,) = dry_run(plans["level 1"])
    return {
        "plans": printed(plans),
        "without reference": without_reference(folder),
        "compared": compared(folder),
        "search": searched(folder),
        "refusals": refusals(folder, plans),
        "dry run": list(run.calls),
        "doctor": doctors(folder),
        "imported": "vllm" in sys.modules,
    }
