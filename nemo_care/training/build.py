"""Build a trainer from a recipe: the only module that imports all of its parts."""

from collections.abc import Mapping, Sequence

import torch

from nemo_care.data.annotations import Annotations
from nemo_care.data.decoding import DecodingWorkers
from nemo_care.data.fingerprints import fingerprints
from nemo_care.data.loader import PromptLoader
from nemo_care.data.mixing import TrainingData
from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.stream import PromptStream
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.evaluation.build import build_evaluator
from nemo_care.evaluation.validation import Validator
from nemo_care.groups.batching import BatchLayout
from nemo_care.models.families import read_family
from nemo_care.models.family import Family
from nemo_care.models.precision import check_transformer_engine
from nemo_care.models.transformer_config import transformer_config
from nemo_care.models.video_language_model import VideoLanguageModel
from nemo_care.models.weights import load_hf_weights
from nemo_care.ranks.process_groups import Ranks
from nemo_care.ranks.stop_request import StopRequest
from nemo_care.recipe.data import for_validation
from nemo_care.recipe.schema import Recipe, needs_reference
from nemo_care.rollouts.build import build_generator, replays_routing
from nemo_care.runs.files import RunFiles
from nemo_care.scoring.reference import Reference
from nemo_care.scoring.rewards import BaseRewards
from nemo_care.scoring.scorer import Scorer
from nemo_care.training.loggers import MetricLogger
from nemo_care.training.policy import Policy
from nemo_care.training.trainer import GRPOCareTrainer

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_model(
    recipe: Recipe, ranks: Ranks, family: Family | None = None, *, fp8: bool = True
) -> VideoLanguageModel:
    """Build this rank's part of the recipe's model (or of `family`), without loading its weights.

    Without `fp8` it computes in bf16 even if the recipe's update uses fp8.

    Raises:
        InputError: the kernels are not available on this machine.
    """
    check_transformer_engine(recipe.model)
    family = family or read_family(recipe.model.hf_path)
    config = transformer_config(
        family,
        ranks.layout,
        _DTYPES[recipe.model.precision.dtype],
        recompute_granularity=recipe.model.recompute_granularity,
        fp8=recipe.model.precision.fp8 if fp8 else None,
    )
    model = family.build(config, recipe.model.backend)
    model.freeze(recipe.model.freeze)
    if recipe.model.vision.shard:
        model.deal_vision()
    return model


def load_model(recipe: Recipe, ranks: Ranks) -> VideoLanguageModel:
    """Build and load this rank's part of the recipe's checkpoint (see `build_model`)."""
    model = build_model(recipe, ranks)
    load_hf_weights(model, recipe.model.hf_path)
    return model


@torch.no_grad()
def build_twin(
    recipe: Recipe, ranks: Ranks, model: VideoLanguageModel, *, fp8: bool
) -> VideoLanguageModel:
    """Build a model with the weights of `model`, without reading its files (see `build_model`).

    Both share the memory of frozen parts.
    """
    twin = build_model(recipe, ranks, model.family, fp8=fp8)
    twin.share_frozen(model)
    weights = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if not twin.is_frozen(name):
            parameter.copy_(weights[name])
    return twin


def build_trainer(
    recipe: Recipe,
    ranks: Ranks,
    files: RunFiles,
    loggers: Sequence[MetricLogger],
    *,
    training: TrainingData,
    levels: Mapping[str, Annotations],
    workers: DecodingWorkers,
    stop: StopRequest | None = None,
) -> GRPOCareTrainer:
    """Build the trainer and all of its parts; collective over all ranks.

    `training` has the training samples, `levels` the validation samples by level; `workers`
    decode both; `stop` is checked after each step.
    """
    algorithm, fp8 = recipe.algorithm, recipe.model.precision.fp8
    model = load_model(recipe, ranks)
    # All models of the run share a frozen vision tower.
    model.keeps_vision = "vision" in model.frozen
    prompt = model.family.prompt
    tokenizer = load_tokenizer(recipe.model.hf_path, prompt)
    prompts = PromptBuilder(recipe.data, prompt, tokenizer)
    validation_prompts = PromptBuilder(for_validation(recipe.data), prompt, tokenizer)
    layout = BatchLayout.of_recipe(recipe, ranks.layout, tokenizer.pad_id)
    reference = None
    if needs_reference(algorithm):
        twin = build_twin(recipe, ranks, model, fp8=fp8.scoring)
        reference = Reference(twin, algorithm, ranks, layout)
    policy = Policy(model, recipe, ranks, layout)
    generator = build_generator(
        recipe,
        ranks,
        model,
        tokenizer,
        groups_per_batch=recipe.rollout.groups_per_batch,
        shared_prompt=algorithm.shared_prompt,
        folder=files.folder,
        version=lambda: policy.optimizer_steps,
        from_checkpoint=True,
        records_routing=replays_routing(recipe, model.family.architecture),
    )
    evaluator = build_evaluator(
        recipe,
        ranks,
        Scorer(model, ranks, layout, fp8=fp8.scoring),
        PromptLoader(validation_prompts, workers),
        likelihoods=reference.answer_likelihoods if reference is not None else None,
        folder=files.folder,
        # Engines of vLLM serve both. Training shards can't: batches of validation differ in size.
        generator=generator if recipe.rollout.backend == "vllm" else None,
    )
    return GRPOCareTrainer(
        recipe,
        ranks,
        prompts=PromptStream(
            training,
            PromptLoader(prompts, workers),
            ranks,
            prompts_per_step=algorithm.prompts_per_step,
            seed=recipe.trainer.seed,
            shuffle=recipe.data.train.shuffle,
            max_skipped_fraction=recipe.data.max_skipped_fraction,
            prefetch_steps=recipe.data.prefetch_steps,
        ),
        generator=generator,
        rewards=BaseRewards(algorithm, ranks, recipe.rollout),
        reference=reference,
        policy=policy,
        validator=Validator(
            {level: annotations.samples for level, annotations in levels.items()}, evaluator
        ),
        files=files,
        tokenizer=tokenizer,
        loggers=loggers,
        bad_lines=[item for read in (*training.sources, *levels.values()) for item in read.bad],
        annotations=fingerprints(training, levels),
        stop=stop,
    )
