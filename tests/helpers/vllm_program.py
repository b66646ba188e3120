"""Rollouts of several ranks from an engine that the test's own process serves.

    python tests/helpers/vllm_program.py CHECKPOINT WORLD OUT ADDRESS PIPELINE

Each rank writes OUT/rank_N.json: what its groups hold, before and after an update.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from small_runs import small_recipe, small_trainer
from vllm_double import KEY as SECRET

from nemo_care.process.environment import VLLM_KEY
from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks
from nemo_care.rollouts.generator import Sampling

SAMPLING = Sampling(group_size=2, temperature=1.0, top_p=0.95, max_tokens=8, seed=(5,))


def main() -> None:
    checkpoint, world, out = map(Path, sys.argv[1:4])
    os.environ[VLLM_KEY.name] = SECRET
    ranks = Ranks(Layout(pipeline=int(sys.argv[5])), RankEnvironment.read())
    recipe = small_recipe(checkpoint, world)
    recipe.rollout.backend = "vllm"
    recipe.rollout.vllm.placement = "separate"
    recipe.rollout.vllm.hosts = [sys.argv[4]]
    recipe.rollout.vllm.timeout_seconds = 60
    recipe.trainer.devices = ranks.world_size
    trainer = small_trainer(recipe, ranks, out / "run")
    prompts, _ = trainer.prompts.next_step()
    found = []
    for _ in range(2):
        groups = trainer.generator.generate(prompts, SAMPLING)
        found.append([(g.prompt.index, [c.text for c in g.completions]) for g in groups])
        trainer.policy.scheduler.step(1)
    trainer.generator.close()
    (out / f"rank_{ranks.rank}.json").write_text(json.dumps(found))
    ranks.close()


main()
