"""Export a checkpoint of a run, whatever layout wrote it, as a Hugging Face directory."""

from pathlib import Path

from nemo_care.errors import InputError
from nemo_care.quiet import quiet_libraries


def export(source: Path, out: Path) -> None:
    """Write the policy of `source` (a run directory or one of its checkpoints) to `out`.

    Raises:
        InputError: `source` holds no checkpoint, or `out` exists.
    """
    quiet_libraries()
    from nemo_care.algorithms.build import build_model
    from nemo_care.algorithms.policy import PREFIX
    from nemo_care.models.weights import export_hf
    from nemo_care.parallel.checkpoints import list_checkpoints, load_checkpoint, sharding_metadata
    from nemo_care.parallel.process_groups import Layout, Ranks
    from nemo_care.recipes import read_recipe

    source = source.resolve()
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; give a run directory or one of its step_...")
    checkpoint, run = source, source.parent.parent
    if (source / "checkpoints").is_dir():
        found = list_checkpoints(source / "checkpoints")
        if not found:
            raise InputError(f"{source}: the run has no complete checkpoint yet")
        checkpoint, run = found[-1], source
    recipe = read_recipe(run / "recipe.yaml")
    if out.exists():
        raise InputError(f"{out} exists already: remove it or choose another directory")
    ranks = Ranks(Layout())
    model = build_model(recipe, ranks)
    sharded = model.sharded_state_dict(prefix=PREFIX, metadata=sharding_metadata())
    state = load_checkpoint(checkpoint, {"policy": {"model": sharded}})["policy"]["model"]
    model.load_state_dict({name.removeprefix(PREFIX): value for name, value in state.items()})
    export_hf(model, recipe.model.hf_path, out)
    ranks.close()
    print(f"{checkpoint.name} exported to {out}")
