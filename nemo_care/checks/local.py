"""Checks of a recipe against the machine that `machine.examine` has described."""

from collections.abc import Iterator

from nemo_care.checks import hardware
from nemo_care.checks.machine import BROKEN, FOUND, GpuState, Machine
from nemo_care.errors import InputError
from nemo_care.recipe.schema import Recipe


def own_gpus(recipe: Recipe, machine: Machine) -> list[GpuState]:
    """Return the GPUs that the run would use."""
    return machine.gpus[: recipe.trainer.devices]


def devices(recipe: Recipe, machine: Machine) -> Iterator[str]:
    """Report fewer GPUs than the recipe has ranks."""
    wanted, count = recipe.trainer.devices, len(machine.gpus)
    if count and wanted > count:
        gpus = "1 GPU" if count == 1 else f"{count} GPUs"
        yield (
            f"trainer.devices={wanted}, but this machine has {gpus}: set trainer.devices={count} "
            "with a layout that divides it, or use a machine with more"
        )


def kernels(recipe: Recipe, machine: Machine) -> Iterator[str]:
    """Report TransformerEngine or 8-bit products that are not available."""
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


def loggers(recipe: Recipe, machine: Machine) -> Iterator[str]:
    """Report loggers and judges whose package is missing."""
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


def warnings(recipe: Recipe, machine: Machine) -> Iterator[str]:
    """Report possible problems that do not prevent a run."""
    trainer = recipe.trainer
    if trainer.num_nodes > 1:
        yield (
            f"trainer.num_nodes={trainer.num_nodes}: only this machine was checked; the preflight "
            "of slurm/ checks each of them"
        )
    if not machine.gpus and trainer.devices > machine.cores:
        yield (
            f"trainer.devices={trainer.devices} processes share {machine.cores} cores: set "
            f"trainer.devices={machine.cores} or fewer, or use a machine with GPUs"
        )
    if machine.gpus:
        yield from hardware.gpu_error_problems()
        for gpu in own_gpus(recipe, machine):
            if recipe.model.precision.dtype == "bf16" and gpu.capability < (8, 0):
                yield f"GPU {gpu.index} ({gpu.name}) has no fast bf16: use an A100 or newer"
