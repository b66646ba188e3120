"""8-bit matrix products: Megatron's settings, and their requirements on shapes and machine.

Megatron enters TransformerEngine's 8-bit context around each layer (around the whole stage with
delayed scales) whenever `config.fp8` is set, so each model's configuration decides which passes run
in 8 bits. Not yet run on a GPU: the rules are read from TransformerEngine 2.4 to 2.18.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
# The compute capability, and its description.
_NEEDS = {
    "delayed": ((8, 9), "an L40S, H100 or newer"),
    "tensorwise": ((8, 9), "an L40S, H100 or newer"),
    "blockwise": ((9, 0), "an H100 or newer"),
    "mxfp8": ((10, 0), "a B200 or newer"),
}
# TransformerEngine's _compute_mxfp8_support: there, not all layouts of a product are supported.
_NO_MXFP8 = (12, 0)
_BLOCKWISE_CUDA = (12, 9)
_AMAX_HISTORY = 1024
# See TransformerEngine's _extra_state.py.
_PICKLED_SCALES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"


def fp8_arguments(fp8: FP8Config | None, recompute_granularity: str) -> dict[str, Any]:
    """Return arguments of Megatron's `TransformerConfig` for a model that computes in 8 bits.

    If `fp8` is None or not enabled, there are none.
    """
    if fp8 is None or not fp8.enabled:
        return {}
    by_recipe = "e4m3" if fp8.recipe in ("blockwise", "mxfp8") else "hybrid"
    arguments: dict[str, Any] = {
        "fp8": by_recipe if fp8.format == "auto" else fp8.format,
        "fp8_recipe": fp8.recipe,
        # A layer that is recomputed in backward needs its weights' 8-bit copies only briefly.
        # Without recomputation, each micro-batch would keep its own copies.
        "disable_parameter_transpose_cache": recompute_granularity == "full",
    }
    if fp8.recipe == "delayed":
        # TransformerEngine's defaults; Megatron's would use the last step's maximum only.
        arguments |= {"fp8_amax_history_len": _AMAX_HISTORY, "fp8_amax_compute_algo": "max"}
    if fp8.bf16_first_layers or fp8.bf16_last_layers:
        arguments |= {
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": fp8.bf16_first_layers,
            "num_layers_at_end_in_bf16": fp8.bf16_last_layers,
        }
    return arguments


def _product_multiple(recipe: str) -> int:
    """Return the multiple for every dimension of an 8-bit product (`get_fp8_align_size`)."""
    return 32 if recipe == "mxfp8" else 16


def token_multiple(fp8: FP8Config | None, layout: Layout) -> int:
    """Return what a micro-batch's sequence length S must be a multiple of; 1 without 8 bits.

    Tokens are rows of the forward products, and the weights' gradients sum over them, so their
    number is a dimension of 8-bit products: 16, or 32 with mxfp8. With sequence parallelism, this
    applies to each rank's part; and data exchanged by ranks is quantised there, in blocks of 128
    tokens with blockwise scales (otherwise TransformerEngine would exchange bf16).

    The padding tokens are computed like others and affect the maximum of a tensor or block of
    activations; no other token attends to them, so they have no gradients and don't affect the
    maximum of gradients.
    """
    if fp8 is None or not fp8.enabled:
        return 1
    if not layout.sequence_parallel or layout.tensor == 1:
        return _product_multiple(fp8.recipe)
    return layout.tensor * (128 if fp8.recipe == "blockwise" else _product_multiple(fp8.recipe))


def decoding_multiple(fp8: FP8Config | None) -> int:
    """Return what the number of rows of a decoding step must be a multiple of."""
    return _product_multiple(fp8.recipe) if fp8 and fp8.enabled and fp8.rollout else 1


def check_fp8(fp8: FP8Config, model: Architecture, layout: Layout) -> None:
    """Refuse a model or layout that does not fit 8-bit products.

    Raises:
        InputError: a dimension of a rank's matrices does not fit, or too many layers are in bf16.
    """
    if not fp8.enabled:
        return
    if model.experts is not None:
        raise InputError(
            f"{_KEY}.enabled=true: 8-bit products are not supported for a model with experts, "
            "whose tokens Megatron would pad for each expert in every layer; set it to false"
        )
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
    """Refuse kernels that are not available on this machine, with the remedy.

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
            f"{_KEY}.recipe=delayed: this TransformerEngine stores its scales as a pickle, which "
            f"can run code, and refuses to load them when a run resumes from a checkpoint: set "
            f"{_PICKLED_SCALES}=1 if nobody else can write to the checkpoints, or choose tensorwise"
        )


def _scales_can_be_loaded() -> bool:
    """Whether TransformerEngine would load delayed scales from a checkpoint, as 2.16.1, 2.17.1 and
    versions from 2.18 on do only if this is enabled."""
    if os.environ.get(_PICKLED_SCALES) == "1":
        return True
    return find_spec("transformer_engine.pytorch._extra_state") is None


def missing_transformer_engine(why: object) -> InputError:
    """Return the error for a required TransformerEngine that can't be imported."""
    return InputError(
        f"model.backend=transformer_engine: TransformerEngine can't be imported ({why}); install "
        "it on a machine with CUDA (pip install --no-build-isolation -e '.[gpu]', docs/gpu.md), or "
        f"set model.backend=local (and {_KEY}.enabled=false)"
    )


def check_gpu(fp8: FP8Config, capability: tuple[int, int], cuda: str | None) -> None:
    """Refuse a recipe that the GPU's `capability` or torch's `cuda` version does not support.

    Raises:
        InputError: names the recipe and its requirement.
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
def computing(config: TransformerConfig, *, fp8: bool) -> Iterator[None]:
    """Run a model's passes inside in bf16, or in 8 bits if `fp8` and its configuration say so.

    Megatron's layers share the configuration and read it at each forward. Weights are stored in
    bf16 in both cases; TransformerEngine quantises them again at the next pass in 8 bits.
    """
    configured = config.fp8
    if not fp8:
        config.fp8 = None
    try:
        yield
    finally:
        config.fp8 = configured
