"""Steps of two ranks, of which the second gets numbers that are not finite.

    python tests/helpers/numbers_program.py FOLDER CHECKPOINT WORLD NAME

Rank 0 writes FOLDER/NAME.json: for each step what each rank decided.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from bad_numbers import everything, inject, unchanged
from small_runs import one_step, small_recipe, small_trainer

from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks

LAYOUTS = {"tp2": Layout(tensor=2), "pp2": Layout(pipeline=2), "dp2": Layout()}
STEPS = [None, "gradient", None, "rollout", "reference", None, "loss", None]


def main() -> None:
    folder, checkpoint, world = map(Path, sys.argv[1:4])
    name = sys.argv[4]
    ranks = Ranks(LAYOUTS[name], RankEnvironment.read())
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = len(STEPS)
    trainer = small_trainer(recipe, ranks, folder / name)
    decided = []
    for number, kind in enumerate(STEPS, start=1):
        before = everything(trainer)
        undo = inject(trainer, kind) if kind and ranks.rank == 1 else lambda: None
        step = one_step(trainer, number)
        undo()
        trainer.record(step)
        bad = step.not_finite
        decided.append(
            {
                "kind": kind,
                "first": dict(bad.first) if bad else None,
                "bad_step": step.metrics["train/bad_step"],
                "unchanged": unchanged(before, everything(trainer)),
            }
        )
    everyone = ranks.gather_on_rank_zero(decided)
    if ranks.rank == 0:
        (folder / f"{name}.json").write_text(json.dumps(everyone))
    ranks.close()


if __name__ == "__main__":
    main()
