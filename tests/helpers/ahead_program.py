"""Asynchronous steps of two model replicas; run by one process per rank.

    python tests/helpers/ahead_program.py FOLDER NAME

FOLDER/job.pt names checkpoint and world. The run goes to FOLDER/NAME; rank 0 writes to
FOLDER/NAME.pt what each replica asked of its generator. In "fails" that of rank 1 dies, in
"disagrees" its validation finds other log-probabilities than the model's own.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from layout_program import main
from made_background import asynchronous, stand_in_for_vllm
from small_runs import small_recipe, small_trainer

from nemo_care.errors import RunFailed
from nemo_care.ranks.process_groups import Layout, Ranks

LAYOUTS = {"trains": Layout(), "fails": Layout(), "disagrees": Layout()}


def disagree(groups: object) -> None:
    raise RunFailed("rank 1 disagrees")


def run(folder: Path, name: str, ranks: Ranks) -> dict:
    job = torch.load(folder / "job.pt", weights_only=False)
    recipe = asynchronous(small_recipe(job["checkpoint"], job["world"]))
    recipe.trainer.max_steps = 3
    recipe.data.train.shuffle = False
    recipe.checkpoint.save_interval = 1
    if name == "disagrees":
        recipe.data.validation.annotations = {"L1": "validation_L1.jsonl"}
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in_for_vllm(monkeypatch, ranks)
        trainer = small_trainer(recipe, ranks, folder / name)
    if name == "fails" and ranks.rank == 1:
        trainer.generator.failing = {6}
    if name == "disagrees" and ranks.rank == 1:
        trainer.validator.evaluator.check = disagree
    end = None
    try:
        trainer.fit()
    except RunFailed as error:
        end = str(error)
    return {
        "events": ranks.gather_from_replicas(trainer.generator.events),
        "positions": ranks.gather_from_replicas(trainer.rollouts.position),
        "ends": ranks.gather_from_replicas(end),
    }


if __name__ == "__main__":
    main(run, LAYOUTS)
