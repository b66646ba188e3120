"""Plans in fake worlds, which can't exist in a process with a real process group.

A test calls `on_ranks(None, made_plans, folder)`, with the folder of a small model's shape.
"""

import contextlib
import io
import os

import torch
from made_shapes import LENGTHS, PACKAGED, plan_recipe
from rich.console import Console, RenderableType
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from nemo_care.commands import plan as command
from nemo_care.errors import InputError
from nemo_care.planning.advice import _changes, _variant, remedies
from nemo_care.planning.dry_run import dry_run
from nemo_care.planning.flops import head_flops, layer_flops, packed_tokens
from nemo_care.planning.gpus import read_gpu
from nemo_care.planning.measured import Measurements
from nemo_care.planning.plan import Plan, Question, make_plan, plan_as_json
from nemo_care.planning.search import search
from nemo_care.planning.shapes import lengths_of, read_model_shape
from nemo_care.planning.stage import built_stage
from nemo_care.planning.tables import plan_report
from nemo_care.planning.work import Clock


def parameter_counts() -> dict:
    """Return, by model, Hugging Face's parameter count and the sum over the stages of a layout."""
    counts: dict = {}
    for name, (tensor, pipeline) in PACKAGED.items():
        shape = read_model_shape(f"nowhere/{name}")
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(shape.family.hf)
        recipe = plan_recipe(f"nowhere/{name}", tensor, pipeline)
        total = 0
        for number in range(pipeline):
            with built_stage(recipe, shape, number, reference=False) as stage:
                total += stage.build.unique_parameters
        counts[name] = (sum(p.numel() for p in model.parameters()), total)
    return counts


def builds(folder: str) -> dict:
    """Return the contents of a rank in a world of one, by number format."""
    found = {}
    for dtype in ("fp32", "bf16"):
        recipe = plan_recipe(folder, 1, 1)
        recipe.model.precision.dtype = dtype
        with built_stage(recipe, read_model_shape(folder), 0) as stage:
            found[dtype] = vars(stage.build)
    return found


def offloaded(folder: str) -> dict:
    """Return plans with the optimizer's state on the GPU and in CPU memory.

    Neither fits; the first one has the advice, and its report.
    """
    found: dict = {}
    for offload in (False, True):
        recipe = plan_recipe(folder, 1, 1)
        recipe.model.precision.dtype = "bf16"
        recipe.optimizer.offload = offload
        plan = make_plan(recipe, _question(0.001), compare=False)
        advice = [] if offload else remedies(plan)
        found[str(offload)] = plan_as_json(plan, advice) | {
            "text": shown(plan_report(plan, advice))
        }
    return found


def shown(report: RenderableType) -> str:
    """Return a report as text, each line whole."""
    console = Console(file=io.StringIO(), width=2000)
    console.print(report)
    return console.file.getvalue()


def variants(folder: str) -> dict:
    """Return, by proposed change, the recipe planned from what is known of it, and planned anew.

    It takes half a minute: `made_plans` leaves it out.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = {}
    for only in ("", "rollout.vllm"):
        recipe = plan_recipe(folder, 1, 1)
        recipe.model.precision.dtype = "bf16"
        recipe.trainer.devices, recipe.trainer.num_nodes = 4, 2
        recipe.algorithm.prompts_per_step = 128
        recipe.algorithm.groups_per_micro_batch = 2
        recipe.rollout.groups_per_batch = recipe.evaluation.samples_per_batch = 2
        recipe.data.validation.annotations = {"L1": "nowhere.jsonl"}
        if only:
            recipe.rollout.backend = "vllm"
            recipe.rollout.vllm.sleep_level = 0
        question = Question(read_gpu("h100-80gb", 4.0), prompt_tokens=80)
        plan = make_plan(recipe, question, compare=False)
        for change in _changes(plan):
            if str(change).startswith(only):
                variant = _variant(plan, change.keys)
                assert variant is not None, change
                reused = make_plan(variant, question, compare=False, measured=plan.measured)
                anew = make_plan(variant, question, compare=False)
                found[str(change)] = [
                    {"seconds": planned.seconds.total, "host": sum(planned.host.values())}
                    | {
                        f"{s.stage} {phase}": s.peaks[phase]
                        for s in planned.stages
                        for phase in s.peaks
                    }
                    for planned in (reused, anew)
                ]
    return found


EIGHT_BITS = {
    "bf16": ("none", {}),
    "tensorwise": ("none", {"enabled": True}),
    "mxfp8": ("none", {"enabled": True, "recipe": "mxfp8"}),
    "scoring": ("none", {"enabled": True, "scoring": True}),
    "ends": ("none", {"enabled": True, "bf16_first_layers": 1, "bf16_last_layers": 2}),
    "full": ("full", {"enabled": True}),
}


def eight_bits(folder: str) -> dict:
    """Return the memory of both stages of a pipeline and the time of a step, by variant."""
    found = {}
    for name, (granularity, keys) in EIGHT_BITS.items():
        recipe = plan_recipe(folder, 1, 2, granularity)
        recipe.model.backend = "transformer_engine"
        recipe.model.precision.dtype = "bf16"
        for key, value in keys.items():
            setattr(recipe.model.precision.fp8, key, value)
        shape = read_model_shape(folder)
        made = []
        for number in range(2):
            with built_stage(recipe, shape, number) as stage:
                made.append(stage.build)
        question = _question(1.0)
        lengths = lengths_of(recipe, shape.family, *LENGTHS)
        clock = Clock(recipe, shape.family, lengths, question.gpu, question.efficiency)
        found[name] = {
            "builds": [vars(build) for build in made],
            "seconds": vars(clock.step(made)),
        }
    return found


def uses(folder: str, measured: Measurements) -> dict:
    """Return the memory of the phases in a world of one, by recomputation."""
    return {
        granularity: vars(measured.use(plan_recipe(folder, 1, 1, granularity), 0))
        for granularity in ("none", "selective", "full")
    }


def vision_kernels(folder: str) -> dict:
    """Return the vision tower's memory with windows in one kernel call, and in one call each."""
    recipe, shape = plan_recipe(folder, 1, 1), read_model_shape(folder)
    lengths = lengths_of(recipe, shape.family, *LENGTHS)
    found = {}
    for name in ("together", "one_by_one"):
        with built_stage(recipe, shape, 0) as stage:
            if name == "one_by_one":
                stage.model.visual.config._attn_implementation = "sdpa"
            found[name] = stage.activations(lengths)[1]
    return found


def schedule(folder: str) -> list:
    """Return peaks of the real 1F1B schedule on the first of four stages, and of the plan."""
    recipe, shape = plan_recipe(folder, 1, 4), read_model_shape(folder)
    lengths = lengths_of(recipe, shape.family, *LENGTHS)
    measured, planned = Measurements(shape), []
    for count in (1, 2, 3, 4):
        recipe.algorithm.prompts_per_step = count
        planned.append((count, measured.needs(recipe, 0, "update")))
    with built_stage(recipe, shape, 0) as stage:
        return [(stage.update(lengths, n)[0], says) for n, says in planned]


def flops(folder: str) -> dict:
    """Return matrix FLOPs of one micro-batch's forward, counted by torch and by the plan."""
    recipe, shape = plan_recipe(folder, 1, 1), read_model_shape(folder)
    lengths = lengths_of(recipe, shape.family, *LENGTHS)
    size = recipe.algorithm.group_size
    with built_stage(recipe, shape, 0) as stage, FlopCounterMode(display=False) as counter:
        batch = stage.layout.batches(stage.groups(lengths, 1))[0]
        hidden = stage.model(batch.rows.inputs(stage.model))
        batch.log_probs(stage.model, hidden, batch.mask)
    by_operator = counter.get_flop_counts()["Global"]
    vision = shape.family.hf.vision_config
    window = (vision.window_size // vision.patch_size) ** 2
    whole = len(vision.fullatt_block_indexes)
    # The counter only counts matrix products, so attention is excluded on both sides.
    attention = sum(
        4 * vision.hidden_size * t * h * w * pairs * blocks
        for t, h, w in lengths.grids
        for pairs, blocks in ((min(window, h * w), vision.depth - whole), (h * w, whole))
    )
    tokens = packed_tokens(lengths, size, shared=True)
    rows = size * (lengths.completion - 1) + 1
    return {
        "torch": sum(n for op, n in by_operator.items() if "attention" not in str(op)),
        "plan": layer_flops(shape.architecture, tokens)
        + shape.family.vision_flops(lengths.grids)
        - attention
        + head_flops(shape.architecture, rows),
    }


def refusals(folder: str, measured: Measurements) -> dict:
    """Return the line with which each plan is refused, by case."""

    def plan() -> Plan:
        recipe = plan_recipe(folder, 1, 1)
        return make_plan(recipe, _question(0.096), compare=False, measured=measured)

    small = Question(read_gpu("h100-80gb"))
    seven = "nowhere/Qwen2.5-VL-7B-Instruct"
    cases = {
        "tensor": lambda: make_plan(plan_recipe(seven, 3, 1), small),
        "pipeline": lambda: make_plan(plan_recipe(seven, 1, 5), small),
        "model": lambda: make_plan(plan_recipe("nowhere/Other", 1, 1), small),
        "memory": lambda: dry_run(plan()),
    }
    lines = {}
    for name, case in cases.items():
        try:
            case()
        except InputError as error:
            lines[name] = str(error)
    return lines


def _question(extra_gib: float) -> Question:
    """Return a GPU with little more memory than CUDA takes."""
    return Question(read_gpu("h100-80gb", 1.0 + extra_gib), margin=0.0)


def searched(folder: str) -> list:
    """Return overrides found by a search, and the plan of each."""
    recipe = plan_recipe(folder, 1, 1, "full")
    recipe.trainer.devices, recipe.algorithm.prompts_per_step = 2, 1
    question = _question(1.0485)
    tried: list[str] = []
    found = search(recipe, question, 2, 10, tried.append)
    anew = Measurements(read_model_shape(folder))
    plans = [make_plan(item.recipe, question, compare=False, measured=anew) for item in found]
    return [
        (item.overrides, item.peak, plan.worst.peak, plan.fits)
        for item, plan in zip(found, plans, strict=True)
    ] + [tried]


def dry_runs(folder: str, measured: Measurements) -> dict:
    """Return the results of the stages' ranks, by layout."""
    found = {}
    question = Question(read_gpu("h100-80gb"))
    for tensor, pipeline in ((1, 2), (2, 2)):
        recipe = plan_recipe(folder, tensor, pipeline)
        plan = make_plan(recipe, question, compare=False, measured=measured)
        found[f"TP {tensor} PP {pipeline}"] = [vars(run) for run in dry_run(plan)]
    return found


def printed(*arguments: str) -> str:
    """Return the output of the command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        command.main(["--config-name", "tiny_cpu", *arguments])
    return out.getvalue()


def made_plans(folder: str) -> dict:
    """Return all results by subject.

    What several subjects plan of the same recipe and its variants is measured once.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    measured = Measurements(read_model_shape(folder))
    return {
        "counts": parameter_counts(),
        "builds": builds(folder),
        "uses": uses(folder, measured),
        "eight_bits": eight_bits(folder),
        "offloaded": offloaded(folder),
        "vision": vision_kernels(folder),
        "schedule": schedule(folder),
        "flops": flops(folder),
        "refusals": refusals(folder, measured),
        "search": searched(folder),
        "dry_runs": dry_runs(folder, measured),
        "json": printed("--json"),
    }
