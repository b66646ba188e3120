"""The command `nemo-care export`: a run's checkpoint as a Hugging Face directory."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from nemo_care.errors import InputError
from nemo_care.process.quiet import quiet_libraries
from nemo_care.runs.directory import is_run_directory
from nemo_care.runs.lock import LOCK, run_lock


def main(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care export` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="nemo-care export",
        description="Write a trained model as a Hugging Face directory, which transformers, vLLM "
        "and other libraries load. One process on the CPU is enough, whichever layout trained it.",
    )
    parser.add_argument(
        "source", type=Path, help="a run directory (its newest checkpoint) or a step_... folder"
    )
    parser.add_argument("out", type=Path, help="the directory to create")
    parser.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="where the Hugging Face checkpoint that the run started from is now, if it has moved "
        "since (its configuration and tokenizer are copied; weights are not needed)",
    )
    options = parser.parse_args(arguments)
    # A model trained on many GPUs does not fit on one of them; the host's memory is larger.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from nemo_care.ranks.launch import guarded

    return guarded(export, options.source, options.out, options.base)


def export(source: Path, out: Path, base: Path | None = None) -> None:
    """Write the policy of `source` (a run directory or one of its checkpoints) to `out`.

    Configuration and tokenizer are copied from the folder that the run started from, or from `base`
    if that folder has moved.

    Raises:
        InputError: `source` holds no checkpoint, `out` exists, or the folder that the run started
        from is missing, can't be used or does not fit the checkpoint.
    """
    quiet_libraries()
    from nemo_care.checkpoints.run_recipe import recipe_of_run
    from nemo_care.data.tokenizer import load_tokenizer
    from nemo_care.models.families import read_family
    from nemo_care.models.weights import export_hf
    from nemo_care.process.screen import say
    from nemo_care.ranks.process_groups import Layout, Ranks
    from nemo_care.training.build import build_model
    from nemo_care.training.model_source import ModelSource, find_checkpoint, run_of

    checkpoint = find_checkpoint(source)
    recipe = recipe_of_run(run_of(checkpoint), [checkpoint])
    # The checkpoint does not depend on the kernels, and this machine may have no GPU.
    recipe.model.backend = "local"
    recipe.model.precision.fp8.enabled = False
    if out.exists():
        raise InputError(f"{out} exists already: remove it or choose another directory")
    source_folder, key = (base, "--base") if base else (Path(recipe.model.hf_path), "model.hf_path")
    if base is None and not (source_folder / "config.json").is_file():
        raise InputError(
            f"model.hf_path={source_folder}: the checkpoint that the run started from is missing: "
            "give its present place with --base DIR"
        )
    family = read_family(source_folder, key=key)
    load_tokenizer(source_folder, family.prompt, key=key)
    weights = ModelSource("checkpoint", checkpoint, is_checkpoint=True, model_key=key)
    weights.check(family)
    folder = out.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    # The output can also be inside the run's directory.
    name = LOCK if is_run_directory(folder) else f"{out.name}.lock"
    with run_lock(folder, "export", name=name):
        ranks = Ranks(Layout())
        model = build_model(recipe, ranks, family)
        weights.load(model)
        export_hf(model, source_folder, out)
        ranks.close()
    say(f"{checkpoint.name} exported to {out}")
