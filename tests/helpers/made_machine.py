"""A machine and a plan as seen by the doctor."""

from nemo_care.checks.machine import FOUND, GIB, Finding, GpuState, Machine


def made_machine(*, gpus: tuple[GpuState, ...] = (), memory: int = 64 * GIB, **states: str):
    """Return a machine with everything available, except as `states` gives."""
    names = ("transformer_engine", "wandb", "mlflow", "openai")
    findings = [
        Finding("packages", name, states.get(name, FOUND), "a detail", "enables it; pip install it")
        for name in names
    ]
    return Machine(findings, list(gpus), "13.0", 8, memory)


def made_plan(**numbers):
    """Return a plan without starting its process."""
    found = {
        "peak": 40 * GIB, "phase": "update", "allowance": GIB, "host": 10 * GIB,
        "checkpoint": GIB, "flops": 1e12, "engine": "", "remedies": [],
    }  # fmt: skip
    return lambda recipe, machine, arguments: lambda: found | numbers
