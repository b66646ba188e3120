"""Checks of a recipe's inputs: checkpoint, tokenizer, layout, rewards, data.

Each check raises an InputError that names the key or file and the remedy.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from nemo_care.data.annotations import Annotations
from nemo_care.data.mixing import TrainingData
from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.sources import read_levels, read_training, training_sources
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.errors import InputError
from nemo_care.evaluation.files import check_level_names
from nemo_care.miniature import ensure_files
from nemo_care.models.families import read_family
from nemo_care.models.hf_tensors import check_weights
from nemo_care.models.precision import check_fp8
from nemo_care.models.transformer_config import check_layout
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.schema import Recipe, check_training
from nemo_care.training.model_source import evaluated_model, judging_model


def layout(recipe: Recipe) -> None:
    """Reject a layout that does not divide the model."""
    check_layout(read_family(recipe.model.hf_path).architecture, Layout.of(recipe))


def eight_bits(recipe: Recipe) -> None:
    """Reject 8-bit products that the model's layers can't have."""
    architecture = read_family(recipe.model.hf_path).architecture
    check_fp8(recipe.model.precision.fp8, architecture, Layout.of(recipe))


def prompts(recipe: Recipe) -> None:
    """Reject a tokenizer or prompt template that can't make prompts."""
    prompt = read_family(recipe.model.hf_path).prompt
    PromptBuilder(recipe.data, prompt, load_tokenizer(recipe.model.hf_path, prompt))


def levels(recipe: Recipe) -> None:
    """Reject missing validation levels, or names that can't be file names."""
    if not recipe.data.validation.annotations:
        raise InputError(
            "data.validation.annotations has no value: name a file of samples for each level to "
            "evaluate on"
        )
    check_level_names(list(recipe.data.validation.annotations))


def evaluated(recipe: Recipe) -> None:
    """Reject weights to evaluate or judge with that do not fit the model."""
    family = read_family(recipe.model.hf_path)
    for source in (evaluated_model(recipe), judging_model(recipe)):
        if source is not None:
            source.check(family)


def checkpoint(recipe: Recipe) -> None:
    """Reject a checkpoint that can't be read here."""
    read_family(recipe.model.hf_path)
    check_weights(recipe.model.hf_path)


def data_roots(recipe: Recipe) -> Iterator[str]:
    """Report data folders that can't be read here."""
    train, validation = recipe.data.train, recipe.data.validation
    roots = set()
    if train.sources is not None or train.root is not None:
        roots = {(source.kind, source.root) for source in training_sources(recipe.data)}
    if validation.annotations and validation.root is not None:
        roots.add((validation.kind, validation.root))
    for kind, root in sorted(roots):
        # The miniature's files are written on first use.
        if kind != "miniature" and not os.access(root, os.R_OK | os.X_OK):
            yield f"data root {root} can't be read"


def training_data(recipe: Recipe, writes: bool) -> TrainingData | None:
    """Reject training annotations that a run would reject.

    Returns the training data; None for a miniature that has not been written yet.
    """
    # Probes can run separately: without a source there is nothing to read.
    check_training(recipe)
    sources = training_sources(recipe.data)
    there = [_is_there(source.kind, source.root, writes) for source in sources]
    return read_training(recipe.data, seed=recipe.trainer.seed) if all(there) else None


def validation_data(recipe: Recipe, writes: bool) -> dict[str, Annotations]:
    """Reject validation annotations that a run would reject.

    Returns the samples of the levels; empty for a miniature that has not been written yet.
    """
    validation = recipe.data.validation
    is_named = bool(validation.annotations) and validation.root is not None
    if not is_named or _is_there(validation.kind, str(validation.root), writes):
        return read_levels(recipe.data, seed=recipe.trainer.seed)
    return {}


def _is_there(kind: str, root: str, writes: bool) -> bool:
    """Whether a data set can be read now; False only for a miniature not yet written."""
    if writes:
        ensure_files(kind, root)
        return True
    return kind != "miniature" or Path(root).exists()
