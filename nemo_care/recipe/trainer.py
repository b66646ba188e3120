"""The keys under `trainer`, `checkpoint` and `exp_manager` of the recipe."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class TrainerConfig:
    """Length, ranks and seed of a run."""

    max_steps: int = MISSING
    """Steps of the whole run, each one rollout and algorithm.updates_per_rollout updates."""
    devices: int = 1
    """Ranks on one machine: GPUs, or processes where there is no GPU."""
    num_nodes: int = 1
    """Number of machines. More than one requires torchrun or srun to start the ranks."""
    cpu_threads: int = 1
    """Threads of each rank on a machine without GPUs; more help only models larger than tiny."""
    seed: int = 1234
    """Seed of data order and sampling."""
    resume: str = "auto"
    """auto: resume from the run directory's newest checkpoint; never: fail if there is one."""
    validation_interval: int = 0
    """Steps between validations; 0: only before the first and after the last step."""
    max_time_per_run: str | None = None
    """days:hours:minutes:seconds after which the run saves and exits with status 75, ready to be
    restarted; null: no limit."""
    max_bad_steps: int = 3
    """Number of consecutive steps that can be left out because a log-probability, the loss or the
    gradient is NaN or infinite; one more stops the run. 0: the first stops it."""
    show_completion_every: int = 20
    """Steps between sampled completions on the console; W&B and TensorBoard get the whole group of
    each as a table. 0: none are shown."""

    @property
    def world_size(self) -> int:
        """The number of ranks on all machines."""
        return self.devices * self.num_nodes


@dataclass
class CheckpointConfig:
    """What is saved and when."""

    save_interval: int = 50
    """Steps between checkpoints; the last step is always saved."""
    asynchronous: bool = True
    """Continue training while a copy of the state, in CPU memory, is written; false: wait."""
    keep_last: int = 2
    """Number of newest checkpoints to keep; 0: all."""
    keep_every: int = 0
    """Also keep each checkpoint whose step is a multiple of this; 0: none."""
    export: bool = True
    """Write a Hugging Face directory at the end of the run."""


@dataclass
class ExpManagerConfig:
    """NeMo's experiment manager: run directory and loggers."""

    explicit_log_dir: str | None = None
    """The run directory; null: exp_dir/name."""
    exp_dir: str | None = "runs"
    """Folder of run directories; null: nemo_experiments."""
    name: str | None = "default"
    """Name of the run directory in that folder. Recipes that inherit base are named after their
    file and the groups that the command line chose (except the layout)."""
    create_tensorboard_logger: bool = True
    """Write TensorBoard files into the run directory."""
    create_wandb_logger: bool = False
    """Log to Weights & Biases, which requires its package."""
    wandb_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of that logger, such as project and name."""
    create_mlflow_logger: bool = False
    """Log to MLflow, which requires its package."""
    mlflow_logger_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments of that logger, such as experiment_name and tracking_uri."""
