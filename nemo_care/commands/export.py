"""Export a run's checkpoint, whichever layout wrote it, as a Hugging Face directory."""

from pathlib import Path

from nemo_care.errors import InputError
from nemo_care.process.quiet import quiet_libraries
from nemo_care.runs.directory import is_run_directory
from nemo_care.runs.lock import LOCK, run_lock


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
