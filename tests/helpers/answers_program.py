"""A first step of two replicas, of which the second finds no tokens of its answers.

    python tests/helpers/answers_program.py FOLDER CHECKPOINT WORLD

Each rank writes FOLDER/RANK.json: the error that ended its run, or null.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from small_runs import small_recipe, small_trainer

from nemo_care.errors import RunFailed
from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks


def main() -> None:
    folder, checkpoint, world = map(Path, sys.argv[1:])
    ranks = Ranks(Layout(), RankEnvironment.read())
    recipe = small_recipe(checkpoint, world)
    recipe.trainer.max_steps = 1
    trainer = small_trainer(recipe, ranks, folder / "run")
    if ranks.rank == 1:
        lose_answers(trainer)
    error = None
    try:
        trainer.fit()
    except RunFailed as failure:
        error = str(failure)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(error))
    ranks.close()


def lose_answers(trainer, keep: float = 0.0) -> None:
    """Let no answer have tokens, but for the first ones: the share `keep` of the completions."""
    generate = trainer.rollouts.generate

    def losing(prompts):
        groups = generate(prompts)
        completions = [c for group in groups for c in group.completions]
        lost = iter(number >= keep * len(completions) for number in range(len(completions)))
        for group in groups:
            group.completions = [
                dataclasses.replace(c, answer_span=None, answer_cuts=None) if next(lost) else c
                for c in group.completions
            ]
        return groups

    trainer.rollouts.generate = losing


if __name__ == "__main__":
    main()
