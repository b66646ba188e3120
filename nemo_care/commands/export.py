"""Export a checkpoint of a run, whatever layout wrote it, as a Hugging Face directory."""

from pathlib import Path

from nemo_care.errors import InputError
from nemo_care.process.quiet import quiet_libraries
from nemo_care.runs.directory import is_run_directory
from nemo_care.runs.lock import LOCK, run_lock


def export(source: Path, out: Path, base: Path | None = None) -> None:
    """Write the policy of `source` (a run directory or one of its checkpoints) to `out`.

    Its configuration and tokenizer are those of the folder that the run started from, or of `base`
    where that has moved.

    Raises:
        InputError: `source` holds no checkpoint, `out` exists, or the folder that the run started
            from is not there any more, can't be used or does not fit the checkpoint.
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
    # A checkpoint fits any kernels, and this machine may have no GPU.
    recipe.model.backend = "local"
    recipe.model.precision.fp8.enabled = False
    if out.exists():
        raise InputError(f"{out} exists already: remove it or choose another directory")
    source_folder, key = (base, "--base") if base else (Path(recipe.model.hf_path), "model.hf_path")
    if base is None and not (source_folder / "config.json").is_file():
        raise InputError(
            f"model.hf_path={source_folder}: the checkpoint that the run started from is not there "
            "any more; say with --base DIR where it is now"
        )
    family = read_family(source_folder, key=key)
    load_tokenizer(source_folder, family.prompt, key=key)
    weights = ModelSource("checkpoint", checkpoint, is_checkpoint=True, model_key=key)
    weights.check(family)
    folder = out.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    # A run exports into its own directory too.
    name = LOCK if is_run_directory(folder) else f"{out.name}.lock"
    with run_lock(folder, "export", name=name):
        ranks = Ranks(Layout())
        model = build_model(recipe, ranks, family)
        weights.load(model)
        export_hf(model, source_folder, out)
        ranks.close()
    say(f"{checkpoint.name} exported to {out}")
