"""Steps with dynamic sampling in one parallel layout; run by one process per rank.

    python tests/helpers/dynamic_program.py FOLDER NAME

FOLDER/job.pt names checkpoint and world. The run goes to FOLDER/NAME; rank 0 writes to
FOLDER/NAME.pt what each replica trained on.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from layout_program import main
from small_runs import small_recipe, small_trainer

from nemo_care.ranks.process_groups import Layout, Ranks

LAYOUTS = {
    "one": Layout(),
    "dp2": Layout(),
    "pp2": Layout(pipeline=2),
    "dp2_pp2": Layout(pipeline=2),
}


def run(folder: Path, name: str, ranks: Ranks) -> dict:
    job = torch.load(folder / "job.pt", weights_only=False)
    recipe = small_recipe(job["checkpoint"], job["world"])
    recipe.trainer.max_steps = 2
    recipe.data.train.shuffle = False
    # The KL term needs the reference's log-probabilities of the groups that move.
    recipe.algorithm.kl_coefficient = 0.04
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    recipe.algorithm.rewards = ["made_rewards.told_apart"]
    recipe.rollout.dynamic_sampling.enabled = True
    trainer = small_trainer(recipe, ranks, folder / name)
    trained: list[list[int]] = []
    update = trainer.policy.update

    def observed(step, **keywords):
        groups = step.trained
        assert all(group.used for group in groups)
        # The frames of groups that have moved to another replica have come with them.
        held = ranks.is_model_leader
        assert all((group.prompt.frame_bytes > 0) == held for group in groups)
        trained.append([group.prompt.index for group in groups])
        update(step, **keywords)

    trainer.policy.update = observed
    trainer.fit()
    return {"trained": ranks.gather_from_replicas(trained), "position": trainer.prompts.position}


if __name__ == "__main__":
    main(run, LAYOUTS)
