"""Two replicas train with the optimizer's state in CPU memory and without, and save checkpoints.

    python tests/helpers/optimizer_offload_program.py WORK_FOLDER

WORK_FOLDER/job.pt says where the data is; each rank writes WORK_FOLDER/rank-N.pt.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from small_runs import small_recipe, small_trainer

from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks


def shards(trainer) -> dict[str, torch.Tensor]:
    """This rank's share of the optimizer's state."""
    (part,) = trainer.policy.optimizer.chained_optimizers
    found = {}
    for index, parameter in enumerate(p for g in part.optimizer.param_groups for p in g["params"]):
        found[f"master {index}"] = parameter.detach().clone()
        for name, tensor in part.optimizer.state[parameter].items():
            found[f"{name} {index}"] = tensor.clone()
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    ranks = Ranks(Layout(), RankEnvironment.read())
    job = torch.load(folder / "job.pt", weights_only=False)
    recipe = small_recipe(job["checkpoint"], job["world"])
    recipe.model.precision.dtype = "bf16"
    recipe.rollout.max_logprob_difference = 1.0
    found = {}
    for offload in (False, True):
        recipe.optimizer.offload = offload
        recipe.trainer.max_steps = 2
        trainer = small_trainer(recipe, ranks, folder / str(offload))
        trainer.fit()
        found[f"run {offload}"] = shards(trainer)
        # What this run saved, another one takes with the state in the other place.
        recipe.optimizer.offload = not offload
        recipe.trainer.max_steps = 3
        resumed = small_trainer(recipe, ranks, folder / str(offload))
        resumed.resume()
        found[f"loaded {offload}"] = shards(resumed)
        resumed.fit()
        found[f"resumed {offload}"] = shards(resumed)
    torch.save(found, folder / f"rank-{ranks.rank}.pt")
    ranks.close()


if __name__ == "__main__":
    main()
