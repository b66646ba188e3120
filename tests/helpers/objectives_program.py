"""Loss and gradient of every objective in one parallel layout; one process per rank.

    python tests/objectives_program.py WORK_FOLDER NAME

WORK_FOLDER/job.pt says what to do; rank 0 writes WORK_FOLDER/objectives-NAME.pt. Nothing steps: all
objectives are computed with the same weights.
"""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from layout_program import LAYOUTS, gather_gradients, reduce_whole_gradients, share_of
from small_runs import small_recipe, small_trainer

from nemo_care.objective.losses import LOSSES
from nemo_care.ranks.process_groups import RankEnvironment, Ranks
from nemo_care.scoring.credit import Credit


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    ranks = Ranks(LAYOUTS[name], RankEnvironment.read())
    job = torch.load(folder / "job.pt", weights_only=False)
    recipe = small_recipe(job["checkpoint"], job["world"])
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    trainer = small_trainer(recipe, ranks, folder / f"objectives-{name}")
    policy = trainer.policy
    reduce_whole_gradients(policy.wrapped.config)
    groups = share_of(job["groups"], ranks)
    old = share_of(job["old_log_probs"], ranks)
    results = {}
    for case in job["cases"]:
        policy.algorithm = dataclasses.replace(
            recipe.algorithm, clip_low=case["clip"], clip_high=case["clip"]
        )
        policy.loss = LOSSES[case["loss"]]
        policy.masks_truncated = case["truncated"] == "mask"
        Credit(
            dataclasses.replace(recipe.algorithm, advantage=case["advantage"]),
            truncated=case["truncated"],
        )(groups)
        batches = policy.layout.batches(groups)
        vectors = [batch.padded([old[groups.index(g)] for g in batch.groups]) for batch in batches]
        count = policy.loss_count(batches)
        found = policy.forward_backward(batches, count, vectors if case["several"] else ())
        results[case["name"]] = {
            "loss": policy.metrics.reduce(found, count)["train/loss"],
            "gradients": gather_gradients(policy.model),
        }
    if ranks.rank == 0:
        torch.save(results, folder / f"objectives-{name}.pt")
    ranks.close()


if __name__ == "__main__":
    main()
