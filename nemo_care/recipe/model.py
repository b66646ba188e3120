"""The keys under `model` and `optimizer` of the recipe, and their checks (see schema.py)."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_care.errors import InputError

# What `model.freeze` chooses from.
PARTS = ("vision", "merger", "language")
FP8_RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


@dataclass
class FP8Config:
    """8-bit matrix products in the language model's layers, by TransformerEngine. The vision tower,
    the embedding, the output layer, norms and attention itself stay in bf16."""

    enabled: bool = False
    """Requires model.backend=transformer_engine, bf16 and an H100 or newer."""
    recipe: str = "tensorwise"
    """Source of the scales: tensorwise (each tensor itself), delayed (the tensors of earlier
    steps), blockwise (blocks of 128; H100 with CUDA 12.9) or mxfp8 (blocks of 32; B200)."""
    format: str = "auto"
    """e4m3 (all tensors), hybrid (gradients in e5m2, which is coarser and wider) or auto (e4m3 for
    blockwise and mxfp8, otherwise hybrid)."""
    update: bool = True
    """The policy's forward and backward in the update."""
    scoring: bool = False
    """The reference's scoring pass. In bf16, the answer likelihoods are not affected by rounded
    weights."""
    rollout: bool = False
    """Sampling, in training and evaluation. bf16 is faster: decoding is limited by memory
    bandwidth, and 8-bit copies of the weights would be made again for every token."""
    param_gather: bool = False
    """Store and gather the weights in 8 bits. Not supported: the moving average of rounded weights
    would not move, and the optimizer's master weights would not come from the checkpoint."""
    bf16_first_layers: int = 0
    """Number of first layers that stay in bf16; at most those of a pipeline stage, 0 with delayed
    scales."""
    bf16_last_layers: int = 0
    """Number of last layers that stay in bf16; at most those of a pipeline stage, 0 with delayed
    scales."""


@dataclass
class PrecisionConfig:
    """Number formats."""

    dtype: str = "bf16"
    """bf16 (float32 master weights and gradients) or fp32 (for the CPU: on a GPU torch has no fused
    attention for packed groups in float32)."""
    fp8: FP8Config = field(default_factory=FP8Config)


@dataclass
class VisionConfig:
    """How the vision tower is computed."""

    shard: bool = True
    """Deal the frames to the tensor-parallel ranks of the first stage, each of which holds the
    whole tower; false: each of them computes all frames."""


@dataclass
class MoEConfig:
    """Models with experts."""

    routing_replay: bool | None = None
    """Record the experts that each token goes to while it is sampled, and use them again in the
    update: rounding then sends no token to other experts than when it was sampled. null: true with
    rollout.backend=megatron, false with vllm (which returns them on GPUs only, where nothing of it
    has been run) and without experts."""


@dataclass
class ModelConfig:
    """The initial checkpoint and its parallel layout."""

    hf_path: str = MISSING
    """Directory of a Hugging Face checkpoint; its `model_type` names the model family."""
    tensor_model_parallel_size: int = 1
    """Ranks that share each layer; must divide the attention and key-value heads."""
    pipeline_model_parallel_size: int = 1
    """Number of stages over which the layers are distributed; must divide the number of layers."""
    sequence_parallel: bool = False
    """Also split norms and residuals along the sequence (with tensor parallelism)."""
    expert_model_parallel_size: int = 1
    """Ranks over which the experts of each layer are distributed (models with experts); must divide
    their number. These ranks can be those of several replicas, which then sample, score and update
    in step with each other."""
    expert_tensor_parallel_size: int | None = None
    """Ranks that share each expert's matrices; must divide tensor_model_parallel_size. null: 1 with
    expert parallelism, otherwise tensor_model_parallel_size."""
    backend: str = "auto"
    """Implementation of the layers: local (Megatron's linear layers, torch's norms and attention),
    transformer_engine (its fused norms and linear layers and its variable-length attention, on a
    GPU) or auto (local)."""
    recompute_granularity: str = "none"
    """Activations that backward recomputes instead of keeping them: none, selective (those inside
    attention), full (each layer's and the vision tower's)."""
    freeze: list[str] = field(default_factory=list)
    """Parts that are not trained, of vision (the vision tower without its mergers), merger (what
    turns the tower's states into features, deep features included) and language. They have no
    gradient, no optimizer state and no moving average. With vision among them the tower computes
    each prompt once per step."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
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
    """Optimizer steps during which the learning rate rises from 0."""
    decay_steps: int | None = None
    """Optimizer steps until min_lr is reached; null: the length of the run."""
    weight_decay: float = 0.01
    """Applied to matrices only, not to biases and norms."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    eps: float = 1e-8
    """Added to the root of that mean before dividing by it."""
    clip_grad: float = 5.0
    """Largest norm of the whole gradient."""
    overlap_grad_reduce: bool = False
    """Sum the replicas' gradients while backward still runs. Every parameter must get a gradient
    from a step's last micro-batch: with text-only prompts the run stops, unless model.freeze has
    vision and merger."""
    offload: bool = False
    """Keep the optimizer's state (float32 master weights and AdamW's two averages) in CPU memory,
    and on the GPU only during the optimizer's step."""


def check_model(model: ModelConfig) -> None:
    """Check the keys under `model` against each other; their ranges are in schema.py."""
    for part in model.freeze:
        if part not in PARTS:
            raise InputError(f"model.freeze has {part}: choose among {', '.join(PARTS)}")
    if set(model.freeze) == set(PARTS):
        raise InputError(
            f"model.freeze=[{', '.join(model.freeze)}] leaves nothing to train: omit one of them"
        )
    if model.backend == "transformer_engine" and model.precision.dtype != "bf16":
        raise InputError(
            f"model.precision.dtype={model.precision.dtype}: the attention of "
            "model.backend=transformer_engine takes bf16 only; set model.backend=local or bf16"
        )
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        raise InputError(
            "model.sequence_parallel=true needs model.tensor_model_parallel_size above 1"
        )
    expert_tensor = expert_tensor_size(model)
    if model.expert_model_parallel_size == 1 and expert_tensor != model.tensor_model_parallel_size:
        raise InputError(
            f"model.expert_tensor_parallel_size={expert_tensor} needs "
            "model.expert_model_parallel_size above 1, or to equal "
            f"model.tensor_model_parallel_size={model.tensor_model_parallel_size}"
        )
    if model.tensor_model_parallel_size % expert_tensor:
        raise InputError(
            f"model.expert_tensor_parallel_size={expert_tensor} does not divide "
            f"model.tensor_model_parallel_size={model.tensor_model_parallel_size}"
        )
    block = expert_tensor * model.expert_model_parallel_size
    if block % model.tensor_model_parallel_size and model.tensor_model_parallel_size % block:
        raise InputError(
            f"model.expert_model_parallel_size={model.expert_model_parallel_size} * "
            f"model.expert_tensor_parallel_size={expert_tensor} = {block} must be a multiple or a "
            f"divisor of model.tensor_model_parallel_size={model.tensor_model_parallel_size}"
        )
    if model.precision.fp8.enabled:
        _check_fp8(model)


def expert_tensor_size(model: ModelConfig) -> int:
    """Return the ranks that share each expert's matrices."""
    if model.expert_tensor_parallel_size is not None:
        return model.expert_tensor_parallel_size
    return 1 if model.expert_model_parallel_size > 1 else model.tensor_model_parallel_size


def _check_fp8(model: ModelConfig) -> None:
    """Check the keys alone; sizes and the GPU are checked in models/precision.py."""
    fp8, prefix = model.precision.fp8, "model.precision.fp8."
    if model.backend != "transformer_engine":
        raise InputError(
            f"{prefix}enabled=true needs model.backend=transformer_engine "
            f"(it is {model.backend}: Megatron's own layers do not support 8 bits)"
        )
    if fp8.param_gather:
        raise InputError(
            f"{prefix}param_gather=true is not supported: the reference would average weights "
            "that are rounded to 8 bits, and small steps would be lost; set it to false"
        )
    if not fp8.update:
        raise InputError(f"{prefix}update=false gains nothing: set {prefix}enabled=false instead")
    if fp8.recipe == "delayed":
        if fp8.bf16_first_layers or fp8.bf16_last_layers:
            raise InputError(
                f"{prefix}bf16_first_layers and {prefix}bf16_last_layers need a recipe other than "
                "delayed, whose scales are shared by all layers: choose tensorwise"
            )
        for name in ("scoring", "rollout"):
            if getattr(fp8, name):
                # TransformerEngine updates delayed scales only in passes with gradients.
                raise InputError(
                    f"{prefix}{name}=true needs a recipe other than delayed, whose scales come "
                    "from passes with gradients: choose tensorwise"
                )
