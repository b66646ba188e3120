"""A step with and without overlapping gradient sums; run as ranks.

    python tests/helpers/overlap_program.py WORK_FOLDER NAME

WORK_FOLDER/job.pt says what to do; rank 0 writes WORK_FOLDER/NAME.pt.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from layout_program import LAYOUTS, gather_weights, share_of
from small_runs import small_recipe, small_trainer, updated

from nemo_care.ranks.process_groups import RankEnvironment, Ranks


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    ranks = Ranks(LAYOUTS[name], RankEnvironment.read())
    job = torch.load(folder / "job.pt", weights_only=False)
    result = {}
    for overlap in (False, True):
        recipe = small_recipe(job["checkpoint"], job["world"])
        recipe.optimizer.overlap_grad_reduce = overlap
        trainer = small_trainer(recipe, ranks, folder / f"{name}-{overlap}")
        norms = []
        for step in (1, 2):
            groups = share_of(job["groups"], ranks)
            trainer.reference.score_answers(groups)
            trainer.credit(groups)
            norms.append(updated(trainer.policy, groups)["train/grad_norm"])
            trainer.reference.track(trainer.policy.model, step)
        weights, average = (
            gather_weights(model)
            for model in (trainer.policy.model, trainer.reference.average.model)
        )
        result[overlap] = {"norms": norms, "weights": weights, "average": average}
    if ranks.rank == 0:
        torch.save(result, folder / f"{name}.pt")
    ranks.close()


if __name__ == "__main__":
    main()
