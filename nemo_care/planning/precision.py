"""The effect of 8-bit matrix products on a plan: copies of the weights, and the products' peak.

TransformerEngine can't be imported on a machine without CUDA, so a stage is built with Megatron's
own layers in bf16, whose weights and shapes are the same. TransformerEngine's additional memory is
an estimate. Activations are counted as in bf16; in 8 bits the inputs of the products take half.
"""

from collections import Counter
from copy import deepcopy

from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from nemo_care.errors import InputError
from nemo_care.models.architecture import Architecture
from nemo_care.models.precision import check_fp8, check_gpu
from nemo_care.models.video_language_model import VideoLanguageModel
from nemo_care.planning.gpus import Gpu
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.model import FP8Config
from nemo_care.recipe.schema import Recipe, needs_reference

_PRODUCTS = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
# The target machine's CUDA is unknown: assume the newest that a recipe can require.
_ASSUMED_CUDA = "99.0"
_ONE_SCALE_PER = 32


def as_built(recipe: Recipe) -> Recipe:
    """Return the recipe with layers that can be built anywhere, in bf16 instead of 8 bits."""
    built = deepcopy(recipe)
    built.model.backend = "local"
    built.model.precision.fp8 = FP8Config()
    return built


def check_planned(recipe: Recipe, model: Architecture, gpu: Gpu) -> None:
    """Reject 8-bit products that the model, the layout or the GPU does not support.

    Raises:
        InputError: names the key and the remedy.
    """
    fp8 = recipe.model.precision.fp8
    if not fp8.enabled:
        return
    check_fp8(fp8, model, Layout.of(recipe))
    try:
        check_gpu(fp8, gpu.capability, _ASSUMED_CUDA)
    except InputError as error:
        raise InputError(f"--gpu {gpu.name}: {error}") from error


def fp8_layers(recipe: Recipe, layers: int) -> range:
    """Return those of the model's `layers` layers that compute in 8 bits."""
    fp8 = recipe.model.precision.fp8
    if not fp8.enabled:
        return range(0)
    return range(fp8.bf16_first_layers, max(layers - fp8.bf16_last_layers, fp8.bf16_first_layers))


def fp8_copies(recipe: Recipe, model: VideoLanguageModel) -> int:
    """Estimate the bytes of 8-bit weight copies that a rank of this stage keeps.

    A weight's copy, and for backward a transposed one, is kept until the next step, so that the
    micro-batches share them (`is_first_microbatch`, `_fp8_workspaces` in TransformerEngine's
    module/base.py); with full recomputation one layer's at a time (see `fp8_arguments`). Blockwise
    and mxfp8 always have both, the remaining recipes before Blackwell
    (`is_non_tn_fp8_gemm_supported`): there they take half of what is counted here. A pass without
    gradients keeps one copy. mxfp8 adds a scale of one byte per 32 numbers.
    """
    fp8 = recipe.model.precision.fp8
    computed = fp8_layers(recipe, model.config.num_layers)
    offset = get_transformer_layer_offset(model.config)
    of_layer: Counter[int] = Counter()
    for name, parameter in model.language_model.decoder.layers.named_parameters():
        layer = int(name.split(".", 1)[0]) + offset
        if layer in computed and name.endswith(_PRODUCTS):
            of_layer[layer] += parameter.numel()
    if recipe.model.recompute_granularity == "full":
        return 2 * _with_scales(max(of_layer.values(), default=0), fp8)
    copies = 2 + (fp8.scoring and needs_reference(recipe.algorithm))
    return copies * _with_scales(of_layer.total(), fp8)


def _with_scales(numbers: int, fp8: FP8Config) -> int:
    """Return the bytes of 8-bit numbers with their scales."""
    return numbers + (numbers // _ONE_SCALE_PER if fp8.recipe == "mxfp8" else 0)


def fp8_share(recipe: Recipe, model: Architecture) -> float:
    """Return the share of the layers' matrix products that 8-bit passes compute in 8 bits."""
    return len(fp8_layers(recipe, model.layers)) / model.layers


def precision_in_words(recipe: Recipe) -> str:
    """Describe the precision for the plan's headline."""
    fp8 = recipe.model.precision.fp8
    if not fp8.enabled:
        return recipe.model.precision.dtype
    passes = [name for name in ("update", "scoring", "rollout") if getattr(fp8, name)]
    return f"{recipe.model.precision.dtype}, {fp8.recipe} fp8 in {' and '.join(passes)}"
