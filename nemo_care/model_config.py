"""The keys under `model` and `optimizer` of the recipe, and their checks (see config.py)."""

from dataclasses import dataclass, field

from nemo_care.data_config import MISSING
from nemo_care.errors import InputError


@dataclass
class PrecisionConfig:
    """Number formats."""

    dtype: str = "bf16"
    """bf16 (float32 master weights and gradients) or fp32 (for the CPU: on a GPU torch has no fused
    attention for packed groups in float32)."""


@dataclass
class ModelConfig:
    """The checkpoint to start from and how it is cut."""

    hf_path: str = MISSING
    """Directory of a Hugging Face Qwen2.5-VL checkpoint."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer; must divide the attention and key-value heads."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are dealt to; must divide the number of layers."""
    sequence_parallel: bool = False
    """Cut norms and residuals along the sequence too (with tensor parallelism)."""
    backend: str = "auto"
    """Attention kernels: local (torch), transformer_engine (its variable-length attention, on a
    GPU) or auto (local)."""
    recompute_granularity: str = "none"
    """Activations to compute again in backward instead of keeping them: none, selective (those
    inside attention), full (each layer's and the vision tower's)."""
    freeze_vision: bool = False
    """Leave the vision tower's weights as they are."""
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)


@dataclass
class OptimizerConfig:
    """AdamW and its schedule."""

    lr: float = 1e-6
    """Largest learning rate, reached after the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine schedule."""
    schedule: str = "cosine"
    """cosine or constant, after the warm-up."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises from 0."""
    decay_steps: int | None = None
    """Optimizer steps until min_lr is reached; null: those of the whole run."""
    weight_decay: float = 0.01
    """On matrices only; biases and norms are left out."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of that mean before dividing by it."""
    clip_grad: float = 5.0
    """Largest norm of the whole gradient."""


def check_model(model: ModelConfig) -> None:
    """Check the keys under `model` against each other; their ranges are in config.py.

    Raises:
        InputError: names the key, its value and what it may be.
    """
    if model.backend == "transformer_engine" and model.precision.dtype != "bf16":
        raise InputError(
            f"model.precision.dtype={model.precision.dtype}: the attention of "
            "model.backend=transformer_engine takes bf16 only; set model.backend=local or bf16"
        )
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        raise InputError(
            "model.sequence_parallel=true needs model.tensor_model_parallel_size above 1"
        )
