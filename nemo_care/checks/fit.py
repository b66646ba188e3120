"""Check whether a recipe can run on this machine; each reason against it has a remedy."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemo_care.checks.local import own_gpus
from nemo_care.checks.machine import BROKEN, GIB, MISSING, Machine, free_disk
from nemo_care.checks.probes import PERSON, WARNING, Situation, found_by
from nemo_care.recipe.schema import Recipe

_PLAN_SECONDS = 600
# Above this, a step takes about an hour on a machine's cores.
_FLOPS_FOR_A_CPU = 1e15


@dataclass
class Fit:
    """Findings about a recipe: `problems` prevent a run here, `warnings` do not."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    plan: dict[str, Any] | None = None


Plan = Callable[[Recipe, Machine, Sequence[str]], Callable[[], dict[str, Any]]]


def fit_of(recipe: Recipe, machine: Machine, arguments: Sequence[str], plan: Plan | None) -> Fit:
    """Compare a recipe's needs with a machine.

    Args:
        recipe: a composed and checked recipe.
        machine: the result of `examine`.
        arguments: the recipe's command line, for the plan's process.
        plan: starts that process (`start_plan`); None: memory is not checked.
    """
    fit = Fit()
    wait = plan(recipe, machine, arguments) if plan is not None else None
    situation = Situation(recipe, machine)
    # Several probes can read the same file: one line is enough.
    fit.problems = list(dict.fromkeys(found_by(PERSON, situation)))
    fit.warnings = list(found_by(WARNING, situation))
    if wait is not None:
        fit.plan = wait()
        _memory(fit, recipe, machine)
    return fit


# ------------------------------------------------------------------ memory and disk


def start_plan(
    recipe: Recipe, machine: Machine, arguments: Sequence[str]
) -> Callable[[], dict[str, Any]]:
    """Start planning in another process; the returned function waits for the result."""
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
    """Return the bytes available to a rank: the least free GPU's, or its share of CPU memory."""
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
    # Memory of CUDA and NCCL is not used by a rank on a CPU.
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
            remedy = "end other processes on the GPU (nvidia-smi lists them)"
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
            "data.prefetch_steps (nemo-care plan shows what uses it)"
        )
    _disk(fit, recipe, plan["checkpoint"])


def checkpoints_at_a_time(recipe: Recipe) -> int:
    """Return the largest number of checkpoints on the disk, including the one being written."""
    saved = -(-recipe.trainer.max_steps // recipe.checkpoint.save_interval)
    kept = recipe.checkpoint.keep_last or saved
    if recipe.checkpoint.keep_every:
        kept += recipe.trainer.max_steps // recipe.checkpoint.keep_every
    return min(kept + 1, saved + 1)


def _disk(fit: Fit, recipe: Recipe, size: int) -> None:
    from nemo_care.training.experiment import run_directory

    folder, count = run_directory(recipe.exp_manager), checkpoints_at_a_time(recipe)
    free = free_disk(folder)
    fit.facts.append(
        f"disk: a checkpoint is {size / GIB:.2f} GiB, {folder} holds up to {count} of them; "
        f"{free / GIB:.1f} GiB are free"
    )
    if count * size > free:
        fit.warnings.append(
            f"{count} checkpoints of {size / GIB:.1f} GiB do not fit into the {free / GIB:.1f} GiB "
            f"free at {folder}: lower checkpoint.keep_last or choose another "
            "exp_manager.exp_dir"
        )


def missing_mandatory(machine: Machine) -> list[str]:
    """Return a line for each package without which nothing runs."""
    words = {MISSING: "is missing", BROKEN: "is broken"}
    return [
        f"{finding.name} {words[finding.state]} ({finding.detail}): {finding.remedy}"
        for finding in machine.findings
        if finding.stops
    ]
