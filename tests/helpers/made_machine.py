"""A machine and a plan as the doctor finds them."""

from nemo_care.checks.machine import FOUND, GIB, Finding, GpuState, Machine


def made_machine(*, gpus: tuple[GpuState, ...] = (), memory: int = 64 * GIB, **states: str):
    """A machine that has everything but what `states` says."""
    names = ("transformer_engine", "wandb", "mlflow", "openai")
    findings = [
        Finding("packages", name, states.get(name, FOUND), "a detail", "enables it; pip install it")
        for name in names
    ]
    return Machine(findings, list(gpus), "13.0", 8, memory)


def made_plan(**numbers):
    """In place of the plan's process."""
    found = {
        "peak": 40 * GIB, "phase": "update", "allowance": GIB, "host": 10 * GIB,
        "checkpoint": GIB, "flops": 1e12, "engine": "", "remedies": [],
    }  # fmt: skip
    return lambda recipe, machine, arguments: lambda: found | numbers
