"""Build the generator of a recipe, and check what it needs."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from nemo_care.data.tokenizer import ChatTokenizer
from nemo_care.errors import InputError
from nemo_care.models.architecture import Architecture
from nemo_care.models.expert_weights import stores_output_first
from nemo_care.models.families import read_family
from nemo_care.models.video_language_model import VideoLanguageModel
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.schema import Recipe, replicas_of
from nemo_care.rollouts.generator import Generator
from nemo_care.rollouts.megatron import MegatronGenerator
from nemo_care.rollouts.vllm.fleet import Fleet, sleep_level
from nemo_care.rollouts.vllm.generator import VLLMGenerator
from nemo_care.rollouts.vllm.messages import OUTPUT_FIRST, EngineSettings
from nemo_care.rollouts.vllm.placement import check_placement, check_tensor_parallel
from nemo_care.rollouts.vllm.weight_sync import transfer_backend

_INSTALL = (
    "install it with pip install -e '.[vllm]' into an environment of its own (it requires "
    "exactly one version of torch), or set rollout.backend=megatron, which needs nothing"
)
_DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def build_generator(
    recipe: Recipe,
    ranks: Ranks,
    model: VideoLanguageModel,
    tokenizer: ChatTokenizer,
    *,
    groups_per_batch: int,
    shared_prompt: bool,
    folder: Path,
    version: Callable[[], int] = lambda: 0,
    from_checkpoint: bool,
    records_routing: bool = False,
) -> Generator:
    """Build the generator of rollout.backend; collective over all ranks.

    `groups_per_batch` and `shared_prompt` are those of `MegatronGenerator`, `version` and
    `from_checkpoint` those of `VLLMGenerator`, whose engines write their output to the logs in
    `folder`, the run directory. With `records_routing`, groups have the experts of their tokens.
    """
    if recipe.rollout.backend == "megatron":
        return MegatronGenerator(
            model,
            tokenizer,
            ranks,
            groups_per_batch=groups_per_batch,
            shared_prompt=shared_prompt,
            fp8=recipe.model.precision.fp8,
            cuda_graphs=recipe.rollout.cuda_graphs,
            records_routing=records_routing,
        )
    fleet = Fleet(
        recipe.rollout.vllm,
        engine_settings(recipe, model, returns_routing=records_routing),
        ranks,
        devices=recipe.trainer.devices,
        logs=folder / "logs",
    )
    return VLLMGenerator(
        model, tokenizer, ranks, fleet, version=version, from_checkpoint=from_checkpoint
    )


def check_rollouts(recipe: Recipe) -> None:
    """Refuse rollouts that would fail, before any rank starts.

    Raises:
        InputError: vLLM or Ray is missing, the recipe's engines do not fit its ranks, its
            precision or the model, or routing is to be replayed without experts.
    """
    family = read_family(recipe.model.hf_path)
    if recipe.model.moe.routing_replay and family.architecture.experts is None:
        raise InputError("model.moe.routing_replay=true: this model has no experts; remove it")
    if recipe.rollout.backend == "megatron":
        if recipe.rollout.cuda_graphs and family.architecture.experts is not None:
            raise InputError(
                "rollout.cuda_graphs=true: a graph can't be captured for a model with experts, "
                "whose tokens change places at every step; set it to false"
            )
        return
    check_engines(recipe, family.architecture)
    if not _is_installed("vllm"):
        raise InputError(f"rollout.backend=vllm needs the package vllm: {_INSTALL}")
    if recipe.rollout.vllm.ray_address is not None and not _is_installed("ray"):
        raise InputError(
            "rollout.vllm.ray_address needs the package ray: install it with pip install -e "
            "'.[vllm]', or use rollout.vllm.gpus of the training machines"
        )


def replays_routing(recipe: Recipe, architecture: Architecture) -> bool:
    """Whether the update uses the experts recorded while sampling."""
    wanted = recipe.model.moe.routing_replay
    if wanted is None:
        return architecture.experts is not None and recipe.rollout.backend == "megatron"
    return wanted


def _is_installed(package: str) -> bool:
    found = find_spec(package)
    # A folder of that name, for example in the working directory, has no origin.
    return found is not None and found.origin is not None


def check_engines(recipe: Recipe, architecture: Architecture) -> None:
    """Refuse engines that fit neither the recipe's ranks, its precision nor the model.

    Of this machine, only CUDA_VISIBLE_DEVICES matters.

    Raises:
        InputError: names the key and its valid values.
    """
    if recipe.rollout.backend == "megatron":
        return
    model, fp8 = recipe.model, recipe.model.precision.fp8
    if fp8.enabled and fp8.rollout:
        raise InputError(
            "model.precision.fp8.rollout=true is for rollout.backend=megatron; vllm gets the bf16 "
            "weights and computes with them: set it to false"
        )
    check_placement(
        recipe.rollout.vllm,
        devices=recipe.trainer.devices,
        # Too few ranks for one are refused by `check_world`.
        replicas=max(replicas_of(recipe), 1),
        tensor=model.tensor_model_parallel_size,
        pipeline=model.pipeline_model_parallel_size,
    )
    check_tensor_parallel(architecture, recipe.rollout.vllm.tensor_parallel_size)


def engine_settings(
    recipe: Recipe, model: VideoLanguageModel, *, returns_routing: bool = False
) -> EngineSettings:
    """Return the settings of the recipe's engines; `returns_routing` as in `EngineSettings`."""
    vllm, data = recipe.rollout.vllm, recipe.data
    longest = data.max_prompt_tokens + recipe.rollout.max_completion_tokens
    folder = str(Path(recipe.model.hf_path).resolve())
    return EngineSettings(
        folder=folder,
        dtype=_DTYPES[recipe.model.precision.dtype],
        tensor_parallel_size=vllm.tensor_parallel_size,
        max_tokens=min(longest, model.family.architecture.max_positions),
        processor_files=model.family.processor_files(
            max(data.video.max_pixels, data.image.max_pixels)
        ),
        backend=transfer_backend(vllm.placement),
        gpu_memory_utilization=vllm.gpu_memory_utilization,
        kv_cache_gib=vllm.kv_cache_gib,
        enforce_eager=vllm.enforce_eager,
        sleeps=sleep_level(vllm) > 0,
        executor="mp" if vllm.tensor_parallel_size > 1 else "uni",
        load_format=OUTPUT_FIRST if stores_output_first(folder, model.family) else "auto",
        config=model.family.engine_config,
        returns_routing=returns_routing,
    )
