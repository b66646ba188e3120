"""The run directory and the loggers, created by NeMo's experiment manager."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemo_care.errors import InputError
from nemo_care.recipe.trainer import ExpManagerConfig
from nemo_care.training.loggers import reason

_REMEDIES = {
    "wandb": "log in with `wandb login` or set WANDB_API_KEY, record without a network with "
    "WANDB_MODE=offline, or set it to false",
    "mlflow": "check exp_manager.mlflow_logger_kwargs.tracking_uri, or set it to false",
}


def run_directory(config: ExpManagerConfig) -> Path:
    """Return the directory of the run's files.

    `explicit_log_dir` if set, otherwise `exp_dir/name`: the folder that exp_manager uses for a run
    that can be resumed, without a version subfolder for each start.

    Raises:
        InputError: the name is empty, which would mean the working directory.
    """
    if config.explicit_log_dir is not None:
        if not config.explicit_log_dir.strip():
            raise InputError(
                "exp_manager.explicit_log_dir is empty (a shell variable that is not set?): give "
                "a folder, or null for exp_manager.exp_dir/name"
            )
        return Path(config.explicit_log_dir).resolve()
    return (Path(config.exp_dir or "nemo_experiments") / (config.name or "default")).resolve()


def check_loggers(config: ExpManagerConfig) -> None:
    """Refuse loggers that can't work, as far as can be checked without starting them.

    Raises:
        InputError: a package or the W&B project is missing.
    """
    for name in _asked_for(config):
        if find_spec(name) is None:
            raise InputError(
                f"exp_manager.create_{name}_logger=true needs the package {name}: install it with "
                f"pip install {name}, or set it to false"
            )
    names = config.wandb_logger_kwargs
    if config.create_wandb_logger and not (names.get("project") or names.get("name")):
        raise InputError(
            "exp_manager.create_wandb_logger=true needs "
            "exp_manager.wandb_logger_kwargs.project=PROJECT (or .name=RUN)"
        )


def _asked_for(config: ExpManagerConfig) -> list[str]:
    """Return the enabled loggers that need a separate package."""
    asked = {"wandb": config.create_wandb_logger, "mlflow": config.create_mlflow_logger}
    return [name for name, is_asked in asked.items() if is_asked]


def start_experiment(config: ExpManagerConfig) -> tuple[Path, list[Any]]:
    """Create the run directory, and create and start the loggers; rank 0 only.

    Returns:
        The run directory and the loggers that the recipe enables.

    Raises:
        InputError: a logger can't start, for example because W&B has no key or no network.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch import Trainer
    from nemo.utils import logging as nemo_logging
    from nemo.utils.exp_manager import exp_manager
    from omegaconf import OmegaConf

    check_loggers(config)
    nemo_logging.setLevel(nemo_logging.ERROR)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # Under srun, Lightning would compare its one device with the tasks of the job.
        plugins=[LightningEnvironment()],
    )
    settings = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(settings, dict)
    folder = run_directory(config)
    settings.update(
        # In a subfolder, because exp_manager moves existing files away at each start, and a
        # resumed run appends to its metrics.
        explicit_log_dir=str(folder / "logs"),
        exp_dir=None,
        # The trainer implements checkpoints, resuming, preemption and step timing itself.
        create_checkpoint_callback=False,
        resume_if_exists=False,
        create_preemption_callback=False,
        log_step_timing=False,
        log_tflops_per_sec_per_gpu=False,
        seconds_to_sleep=0,
    )
    asked_for = _asked_for(config)
    with _refused(f"exp_manager.{name}_logger_kwargs" for name in asked_for):
        exp_manager(trainer, settings)
    _silence_writer_threads()
    for logger in trainer.loggers:
        _start_logger(logger, asked_for)
    return folder, list(trainer.loggers)


def _start_logger(logger: Any, asked_for: list[str]) -> None:
    """Connect a logger, which Lightning would do only with the first metrics.

    Raises:
        InputError: W&B or MLflow can't start; the remedy is in the message.
    """
    module = type(logger).__module__
    name = next((name for name in asked_for if name in module), None)
    if name is None:
        _ = logger.experiment
        return
    try:
        with _no_prompt():
            _ = logger.experiment
    except Exception as error:
        raise InputError(
            f"exp_manager.create_{name}_logger=true: {type(logger).__name__} can't start "
            f"({reason(error)}): {_REMEDIES[name]}"
        ) from error


@contextmanager
def _refused(keys: Iterator[str]) -> Iterator[None]:
    """Turn errors while W&B's or MLflow's logger is created into ones that name its keys."""
    names = " and ".join(keys)
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if not names:
            raise
        raise InputError(f"{names}: the loggers can't be created ({reason(error)})") from error


@contextmanager
def _no_prompt() -> Iterator[None]:
    """Replace standard input, where W&B would wait for a key to be typed."""
    kept = sys.stdin
    with open("/dev/null", encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = kept


def _silence_writer_threads() -> None:
    """Suppress the traceback of TensorBoard's writer thread.

    The writer keeps the error and raises it in its next call, where it becomes a warning.
    """
    previous = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not type(arguments.thread).__module__.startswith("tensorboard."):
            previous(arguments)

    threading.excepthook = hook
