"""Export a checkpoint of a run, whatever layout wrote it, as a Hugging Face directory."""

from pathlib import Path

from nemo_care.errors import InputError
from nemo_care.quiet import quiet_libraries
from nemo_care.run_directory import is_run_directory
from nemo_care.run_lock import LOCK, run_lock


def export(source: Path, out: Path) -> None:
    """Write the policy of `source` (a run directory or one of its checkpoints) to `out`.

    Raises:
        InputError: `source` holds no checkpoint, or `out` exists.
    """
    quiet_libraries()
    from nemo_care.algorithms.build import build_model
    from nemo_care.model_source import ModelSource, find_checkpoint, run_of
    from nemo_care.models.weights import export_hf
    from nemo_care.parallel.process_groups import Layout, Ranks
    from nemo_care.recipes import read_recipe

    checkpoint = find_checkpoint(source)
    recipe = read_recipe(run_of(checkpoint) / "recipe.yaml")
    # A checkpoint fits any kernels, and this machine may have no GPU.
    recipe.model.backend = "local"
    recipe.model.precision.fp8.enabled = False
    if out.exists():
        raise InputError(f"{out} exists already: remove it or choose another directory")
    folder = out.absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    # A run exports into its own directory too.
    name = LOCK if is_run_directory(folder) else f"{out.name}.lock"
    with run_lock(folder, "export", name=name):
        ranks = Ranks(Layout())
        model = build_model(recipe, ranks)
        ModelSource("checkpoint", checkpoint, is_checkpoint=True).load(model)
        export_hf(model, recipe.model.hf_path, out)
        ranks.close()
    print(f"{checkpoint.name} exported to {out}")
