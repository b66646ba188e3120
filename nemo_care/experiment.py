"""The run directory and the loggers, as NeMo's experiment manager makes them."""

from pathlib import Path
from typing import Any

from nemo_care.config import ExpManagerConfig
from nemo_care.errors import InputError


def run_directory(config: ExpManagerConfig) -> Path:
    """Where the run's files go.

    `explicit_log_dir` if given, else `exp_dir/name`: the folder that exp_manager takes for a run
    that can be resumed, without a version of its own for each start.

    Raises:
        InputError: an empty name, which would mean the working directory.
    """
    if config.explicit_log_dir is not None:
        if not config.explicit_log_dir.strip():
            raise InputError(
                "exp_manager.explicit_log_dir is empty (a shell variable that is not set?): give "
                "a folder, or null for exp_manager.exp_dir/name"
            )
        return Path(config.explicit_log_dir).resolve()
    return (Path(config.exp_dir or "nemo_experiments") / (config.name or "default")).resolve()


def start_experiment(config: ExpManagerConfig) -> tuple[Path, list[Any]]:
    """Make the run directory and the loggers; rank 0 only.

    Returns:
        The run directory and the loggers that the recipe asks for.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch import Trainer
    from nemo.utils import logging as nemo_logging
    from nemo.utils.exp_manager import exp_manager
    from omegaconf import OmegaConf

    nemo_logging.setLevel(nemo_logging.ERROR)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        # Under srun it would hold its one device against the tasks of the job.
        plugins=[LightningEnvironment()],
    )
    settings = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(settings, dict)
    folder = run_directory(config)
    settings.update(
        # A folder of its own: exp_manager moves the files that it finds there out of the way at
        # each start, and a resumed run goes on with its metrics.
        explicit_log_dir=str(folder / "logs"),
        exp_dir=None,
        # Checkpoints, resuming, preemption and step timing are the trainer's own.
        create_checkpoint_callback=False,
        resume_if_exists=False,
        create_preemption_callback=False,
        log_step_timing=False,
        log_tflops_per_sec_per_gpu=False,
        seconds_to_sleep=0,
    )
    exp_manager(trainer, settings)
    return folder, list(trainer.loggers)
