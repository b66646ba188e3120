"""Can this recipe run on this machine? Each reason against it is one line with its remedy."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_care.checks.machine import BROKEN, FOUND, GIB, MISSING, GpuState, Machine, free_disk
from nemo_care.errors import InputError
from nemo_care.recipe.schema import Recipe
from nemo_care.training.experiment import run_directory

_PLAN_SECONDS = 600
# Above it a step takes about an hour on a machine's cores.
_FLOPS_FOR_A_CPU = 1e15


@dataclass
class Fit:
    """What was found about a recipe: `problems` keep it from running here, `warnings` may."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    plan: dict[str, Any] | None = None


Plan = Callable[[Recipe, Machine, Sequence[str]], Callable[[], dict[str, Any]]]


def fit_of(recipe: Recipe, machine: Machine, arguments: Sequence[str], plan: Plan | None) -> Fit:
    """Hold a recipe against a machine.

    Args:
        recipe: a composed and checked one.
        machine: what `examine` found.
        arguments: the recipe's on the command line, for the plan's own process.
        plan: starts that process (`start_plan`); None: memory is not looked at.
    """
    fit = Fit()
    wait = plan(recipe, machine, arguments) if plan is not None else None
    problems = [*_devices(recipe, machine), *_kernels(recipe, machine)]
    problems += [*_loggers(recipe, machine), *_inputs(recipe)]
    # Parts of the checks ask for the same file: one line is enough.
    fit.problems = list(dict.fromkeys(problems))
    fit.warnings = list(_warnings(recipe, machine))
    if wait is not None:
        fit.plan = wait()
        _memory(fit, recipe, machine)
    return fit


def own_gpus(recipe: Recipe, machine: Machine) -> list[GpuState]:
    """The GPUs that the run would take."""
    return machine.gpus[: recipe.trainer.devices]


def _devices(recipe: Recipe, machine: Machine) -> Iterator[str]:
    wanted, count = recipe.trainer.devices, len(machine.gpus)
    if count and wanted > count:
        gpus = "1 GPU" if count == 1 else f"{count} GPUs"
        yield (
            f"trainer.devices={wanted}, but this machine has {gpus}: set trainer.devices={count} "
            "with a layout that divides it, or start the run where there are more"
        )


def _kernels(recipe: Recipe, machine: Machine) -> Iterator[str]:
    from nemo_care.models.precision import check_gpu, missing_transformer_engine

    model = recipe.model
    if model.backend != "transformer_engine":
        return
    engine = machine.state("transformer_engine")
    if engine.state == BROKEN:
        yield str(missing_transformer_engine(engine.detail))
    if not machine.gpus:
        yield (
            "model.backend=transformer_engine needs a GPU, and torch finds none here: set "
            "model.backend=local (and model.precision.fp8.enabled=false)"
        )
    if model.precision.fp8.enabled:
        for gpu in own_gpus(recipe, machine):
            try:
                check_gpu(model.precision.fp8, gpu.capability, machine.cuda)
            except InputError as error:
                yield str(error)


def _loggers(recipe: Recipe, machine: Machine) -> Iterator[str]:
    asked = {
        "wandb": ("exp_manager.create_wandb_logger=true", recipe.exp_manager.create_wandb_logger),
        "mlflow": (
            "exp_manager.create_mlflow_logger=true",
            recipe.exp_manager.create_mlflow_logger,
        ),
        "openai": ("evaluation.judge=llm", recipe.evaluation.judge == "llm"),
    }
    for name, (key, is_asked) in asked.items():
        finding = machine.state(name)
        if is_asked and finding.state != FOUND:
            yield f"{key} needs the package {name} ({finding.detail}): {_install(finding.remedy)}"


def _install(remedy: str) -> str:
    return remedy.rpartition("; ")[2]


def _inputs(recipe: Recipe) -> Iterator[str]:
    """What a training run would refuse at its start; nothing is written."""
    from nemo_care.checks.recipe import training_checks

    for check in training_checks(recipe, writes=False):
        try:
            check()
        except InputError as error:
            yield str(error)


def _warnings(recipe: Recipe, machine: Machine) -> Iterator[str]:
    trainer = recipe.trainer
    if trainer.num_nodes > 1:
        yield (
            f"trainer.num_nodes={trainer.num_nodes}: this is one of the machines, the others were "
            "not looked at; the preflight of slurm/ asks each of them"
        )
    if not machine.gpus and trainer.devices > machine.cores:
        yield (
            f"trainer.devices={trainer.devices} processes share {machine.cores} cores: set "
            f"trainer.devices={machine.cores} or fewer, or use a machine with GPUs"
        )
    if machine.gpus:
        from nemo_care.checks.node import gpu_error_problems

        yield from gpu_error_problems()
        for gpu in own_gpus(recipe, machine):
            if recipe.model.precision.dtype == "bf16" and gpu.capability < (8, 0):
                yield f"GPU {gpu.index} ({gpu.name}) has no fast bf16: use an A100 or newer"


# ------------------------------------------------------------------ memory and disk


def start_plan(
    recipe: Recipe, machine: Machine, arguments: Sequence[str]
) -> Callable[[], dict[str, Any]]:
    """Begin to plan in another process; call the result for what it found."""
    gpus = own_gpus(recipe, machine)
    capability = ".".join(map(str, gpus[0].capability)) if gpus else ""
    free = room(recipe, machine)
    total = min((gpu.total for gpu in gpus), default=free)
    memory = [repr(size / GIB) for size in (free, max(total, free))]
    command = [sys.executable, "-m", "nemo_care.checks.planned", capability, *memory]
    process = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )

    def wait() -> dict[str, Any]:
        try:
            out, errors = process.communicate(timeout=_PLAN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return {"error": f"it took longer than {_PLAN_SECONDS} seconds"}
        if process.returncode:
            lines = errors.strip().splitlines() or [f"exit status {process.returncode}"]
            return {"error": lines[-1]}
        return json.loads(out.splitlines()[-1])

    return wait


def room(recipe: Recipe, machine: Machine) -> float:
    """Bytes that a rank can have: the least free GPU's, or its share of the CPU's memory."""
    gpus = own_gpus(recipe, machine)
    if gpus:
        return min(gpu.free for gpu in gpus)
    return max(machine.memory_available, 1) / recipe.trainer.devices


def _memory(fit: Fit, recipe: Recipe, machine: Machine) -> None:
    plan = fit.plan
    assert plan is not None
    if "error" in plan:
        fit.warnings.append(f"memory was not planned: {plan['error']}")
        return
    gpus, has = own_gpus(recipe, machine), room(recipe, machine)
    # CUDA's own memory and NCCL's are no part of a rank on a CPU.
    needs = plan["peak"] if gpus else plan["peak"] - plan["allowance"]
    where = "GPU" if gpus else "rank on the CPU"
    fit.facts.append(
        f"memory: {needs / GIB:.2f} GiB per {where} at the peak ({plan['phase']}, by the plan), "
        f"{has / GIB:.1f} GiB are free"
    )
    if plan["engine"]:
        fit.problems.append(plan["engine"])
    if needs > has:
        remedy = f"set {plan['remedies'][0]}" if plan["remedies"] else "see nemo-care plan --search"
        if gpus and needs <= min(gpu.total for gpu in gpus):
            remedy = "end what else is on the GPU (nvidia-smi lists it)"
        fit.problems.append(
            f"{plan['phase']} needs {needs / GIB:.1f} GiB per {where} by the plan, and "
            f"{has / GIB:.1f} GiB are free: {remedy}"
        )
    if not gpus and plan["flops"] > _FLOPS_FOR_A_CPU:
        fit.warnings.append(
            f"a step is {plan['flops']:.1e} floating-point operations, hours on a CPU: use a "
            "machine with GPUs"
        )
    if gpus and plan["host"] > machine.memory_available:
        fit.warnings.append(
            f"about {plan['host'] / GIB:.0f} GiB of CPU memory are needed, "
            f"{machine.memory_available / GIB:.0f} GiB are free: lower data.workers or "
            "data.prefetch_steps (nemo-care plan lists what takes it)"
        )
    _disk(fit, recipe, plan["checkpoint"])


def checkpoints_at_a_time(recipe: Recipe) -> int:
    """Checkpoints that lie on the disk at most, the one that is being written counted."""
    saved = -(-recipe.trainer.max_steps // recipe.checkpoint.save_interval)
    kept = recipe.checkpoint.keep_last or saved
    if recipe.checkpoint.keep_every:
        kept += recipe.trainer.max_steps // recipe.checkpoint.keep_every
    return min(kept + 1, saved + 1)


def _disk(fit: Fit, recipe: Recipe, size: int) -> None:
    folder, count = run_directory(recipe.exp_manager), checkpoints_at_a_time(recipe)
    free = free_disk(folder)
    fit.facts.append(
        f"disk: a checkpoint is {size / GIB:.2f} GiB, {count} of them lie in {folder} at most; "
        f"{free / GIB:.1f} GiB are free"
    )
    if count * size > free:
        fit.warnings.append(
            f"{count} checkpoints of {size / GIB:.1f} GiB do not fit into the {free / GIB:.1f} GiB "
            f"that are free at {folder}: lower checkpoint.keep_last or choose another "
            "exp_manager.exp_dir"
        )


def missing_mandatory(machine: Machine) -> list[str]:
    """A line for each package without which nothing runs."""
    words = {MISSING: "is missing", BROKEN: "is broken"}
    return [
        f"{finding.name} {words[finding.state]} ({finding.detail}): {finding.remedy}"
        for finding in machine.findings
        if finding.stops
    ]
