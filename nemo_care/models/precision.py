"""8-bit matrix products: Megatron's settings for them, what they ask of shapes and of the machine.

Megatron enters TransformerEngine's 8-bit context around each layer (around the whole stage with
delayed scales) whenever `config.fp8` is set, so which passes run in 8 bits is decided by each
model's configuration. Not run on a GPU yet: the rules are read from TransformerEngine 2.4 to 2.18.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from nemo_care.errors import InputError
from nemo_care.megatron.te_import import why_unusable
from nemo_care.models.architecture import Architecture
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.model import FP8Config, ModelConfig

_KEY = "model.precision.fp8"
# Compute capability, and in words.
_NEEDS = {
    "delayed": ((8, 9), "an L40S, H100 or newer"),
    "tensorwise": ((8, 9), "an L40S, H100 or newer"),
    "blockwise": ((9, 0), "an H100 or newer"),
    "mxfp8": ((10, 0), "a B200 or newer"),
}
# TransformerEngine's _compute_mxfp8_support: not for all layouts of a product there.
_NO_MXFP8 = (12, 0)
_BLOCKWISE_CUDA = (12, 9)
_AMAX_HISTORY = 1024
# TransformerEngine's _extra_state.py.
_PICKLED_SCALES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def fp8_arguments(fp8: FP8Config | None, recompute_granularity: str) -> dict[str, Any]:
    """Arguments of Megatron's `TransformerConfig` for a model that computes in 8 bits.

    None, or not enabled: no arguments.
    """
    if fp8 is None or not fp8.enabled:
        return {}
    by_recipe = "e4m3" if fp8.recipe in ("blockwise", "mxfp8") else "hybrid"
    arguments: dict[str, Any] = {
        "fp8": by_recipe if fp8.format == "auto" else fp8.format,
        "fp8_recipe": fp8.recipe,
        # A layer that is computed again in backward needs its weights' 8-bit copies for a moment
        # only. Without recomputation each micro-batch would keep its own.
        "disable_parameter_transpose_cache": recompute_granularity == "full",
    }
    if fp8.recipe == "delayed":
        # TransformerEngine's own values; Megatron's would take the last step's largest number only.
        arguments |= {"fp8_amax_history_len": _AMAX_HISTORY, "fp8_amax_compute_algo": "max"}
    if fp8.bf16_first_layers or fp8.bf16_last_layers:
        arguments |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": fp8.bf16_first_layers,
            "num_layers_at_end_in_bf16": fp8.bf16_last_layers,
        }
    return arguments


def _product_multiple(recipe: str) -> int:
    """What every dimension of an 8-bit product must be a multiple of (`get_fp8_align_size`)."""
    return 32 if recipe == "mxfp8" else 16


def token_multiple(fp8: FP8Config | None, layout: Layout) -> int:
    """What the length S of a micro-batch's sequences must be a multiple of; 1 without 8 bits.

    Tokens are rows of the forward products and what the weights' gradients sum over, so their
    number is a dimension of 8-bit products: 16, with mxfp8 32. With sequence parallelism this holds
    for each rank's part; and what ranks exchange is quantised there, by blocks of 128 tokens with
    blockwise scales (TransformerEngine would exchange bf16 otherwise).

    The padding tokens are computed like others and take part in the largest value of a tensor
    or block of activations; nothing sees them, so they have no gradients and no part in those of
    gradients.
    """
    if fp8 is None or not fp8.enabled:
        return 1
    if not layout.sequence_parallel or layout.tensor == 1:
        return _product_multiple(fp8.recipe)
    return layout.tensor * (128 if fp8.recipe == "blockwise" else _product_multiple(fp8.recipe))


def decoding_multiple(fp8: FP8Config | None) -> int:
    """What the number of rows of a decoding step must be a multiple of."""
    return _product_multiple(fp8.recipe) if fp8 and fp8.enabled and fp8.rollout else 1


def check_fp8(fp8: FP8Config, model: Architecture, layout: Layout) -> None:
    """Refuse a model or layout that 8-bit products do not fit.

    Raises:
        InputError: a dimension of a rank's matrices, or too many layers in bf16.
    """
    if not fp8.enabled:
        return
    multiple = _product_multiple(fp8.recipe)
    of_rank = {
        "hidden size": model.hidden_size,
        "query, key and value size": model.query_size // layout.tensor
        + 2 * model.kv_size // layout.tensor,
        "attention size": model.query_size // layout.tensor,
        "intermediate size": model.ffn_size // layout.tensor,
    }
    for name, size in of_rank.items():
        if size % multiple:
            raise InputError(
                f"{_KEY}.recipe={fp8.recipe} needs matrices with multiples of {multiple}, but the "
                f"model's {name} is {size} on a rank with model.tensor_model_parallel_size="
                f"{layout.tensor}: choose another recipe or a smaller size"
            )
    layers = model.layers // layout.pipeline
    for name in ("bf16_first_layers", "bf16_last_layers"):
        if getattr(fp8, name) > layers:
            raise InputError(
                f"{_KEY}.{name}={getattr(fp8, name)}: a pipeline stage has {layers} layers, and "
                "Megatron keeps no more in bf16 at either end"
            )


def check_transformer_engine(model: ModelConfig) -> None:
    """Refuse kernels that this machine has not got; says how to get them.

    Raises:
        InputError: TransformerEngine is missing, the GPU or CUDA is too old for the recipe, or its
            scales could be saved but not loaded.
    """
    if model.backend != "transformer_engine":
        return
    why = why_unusable()
    if why is None and find_spec("transformer_engine") is None:
        why = "it is not installed"
    if why is not None:
        raise missing_transformer_engine(why)
    fp8 = model.precision.fp8
    if fp8.enabled and torch.cuda.is_available():
        check_gpu(fp8, torch.cuda.get_device_capability(), torch.version.cuda)
    if fp8.enabled and fp8.recipe == "delayed" and not _scales_can_be_loaded():
        raise InputError(
            f"{_KEY}.recipe=delayed: this TransformerEngine keeps its scales as a pickle, which "
            f"may run code, and refuses to load them when a run goes on from a checkpoint: set "
            f"{_PICKLED_SCALES}=1 if nobody else can write to the checkpoints, or choose tensorwise"
        )


def _scales_can_be_loaded() -> bool:
    """Whether TransformerEngine would load delayed scales from a checkpoint, as 2.16.1, 2.17.1 and
    from 2.18 do only where they are told to."""
    if os.environ.get(_PICKLED_SCALES) == "1":
        return True
    return find_spec("transformer_engine.pytorch._extra_state") is None


def missing_transformer_engine(why: object) -> InputError:
    """What to tell who asks for TransformerEngine where it can't be imported."""
    return InputError(
        f"model.backend=transformer_engine: TransformerEngine can't be imported ({why}); install "
        "it on a machine with CUDA (pip install --no-build-isolation -e '.[gpu]', docs/gpu.md), or "
        f"set model.backend=local (and {_KEY}.enabled=false)"
    )


def check_gpu(fp8: FP8Config, capability: tuple[int, int], cuda: str | None) -> None:
    """Refuse a recipe that the GPU's `capability` or torch's `cuda` version does not run.

    Raises:
        InputError: names the recipe and what it needs.
    """
    least, words = _NEEDS[fp8.recipe]
    found = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    if capability < least or (fp8.recipe == "mxfp8" and capability >= _NO_MXFP8):
        between = " and below 12.0" if fp8.recipe == "mxfp8" else ""
        raise InputError(
            f"{_KEY}.recipe={fp8.recipe} needs {words} (compute capability {least[0]}.{least[1]}"
            f"{between}); {found}: choose another recipe"
        )
    if fp8.recipe == "blockwise":
        version = tuple(int(part) for part in (cuda or "0.0").split(".")[:2])
        if version < _BLOCKWISE_CUDA:
            raise InputError(f"{_KEY}.recipe=blockwise needs CUDA 12.9; torch has {cuda}")


@contextmanager
def _without_fp8(config: TransformerConfig) -> Iterator[None]:
    fp8, config.fp8 = config.fp8, None
    try:
        yield
    finally:
        config.fp8 = fp8


def computing(config: TransformerConfig, *, fp8: bool) -> Any:
    """Passes of a model inside: in bf16 unless `fp8` (and its configuration) says 8 bits.

    Megatron's layers share the configuration and read it at each forward. Weights are stored in
    bf16 either way; TransformerEngine quantises them again at the next pass in 8 bits.
    """
    return nullcontext() if fp8 else _without_fp8(config)
