"""Small recipes and trainers, for tests in one process and on ranks."""

import shutil
from pathlib import Path

import torch
from records import lines, without_timing

from nemo_care.data.decoding import DecodingWorkers
from nemo_care.data.sources import RunData
from nemo_care.groups.group import Group
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.schema import Recipe
from nemo_care.runs.files import RunFiles
from nemo_care.training.build import build_trainer
from nemo_care.training.policy import Policy
from nemo_care.training.step import Step
from nemo_care.training.trainer import GRPOCareTrainer


def small_recipe(checkpoint: Path, world: Path) -> Recipe:
    """Return a recipe with 4 prompts of 4 completions, all features on, and visible rates."""
    recipe = Recipe()
    recipe.trainer.max_steps = 4
    recipe.trainer.seed = 3
    recipe.model.hf_path = str(checkpoint)
    recipe.model.precision.dtype = "fp32"
    recipe.algorithm.group_size = 4
    recipe.algorithm.prompts_per_step = 4
    recipe.algorithm.groups_per_micro_batch = 1
    recipe.algorithm.reference.ema_decay = 0.9
    recipe.algorithm.reference.ema_update_every = 1
    recipe.rollout.max_completion_tokens = 24
    recipe.rollout.groups_per_batch = 4
    recipe.optimizer.lr = 1e-3
    recipe.optimizer.schedule = "constant"
    recipe.optimizer.weight_decay = 0.1
    recipe.optimizer.clip_grad = 0.05
    recipe.checkpoint.save_interval = 2
    recipe.checkpoint.export = False
    recipe.data.prompt_template = "{question}"
    recipe.data.train.root = str(world)
    recipe.data.validation.root = str(world)
    recipe.data.video.min_pixels = recipe.data.video.max_pixels = 784
    recipe.data.video.max_frames = 8
    recipe.data.workers = 0
    return recipe


def small_trainer(
    recipe: Recipe, ranks: Ranks, folder: Path, *, saves: bool = True
) -> GRPOCareTrainer:
    """Return a trainer of the recipe without NeMo's loggers.

    Saving takes longer than a step: say `saves=False` if no test reads the checkpoints.
    """
    data = RunData.on_every_rank(
        ranks, None, lambda: RunData.read(recipe.data, seed=recipe.trainer.seed)
    )
    assert data.training is not None
    trainer = build_trainer(
        recipe,
        ranks,
        RunFiles(folder),
        [],
        training=data.training,
        levels=data.levels,
        workers=DecodingWorkers.of(recipe.data, leads=ranks.is_model_leader),
    )
    if not saves:
        trainer.save = lambda: None  # type: ignore[method-assign]
    return trainer


def whole_and_resumed(
    recipe: Recipe, ranks: Ranks, folder: Path, *, lost: int | None = None
) -> tuple[GRPOCareTrainer, GRPOCareTrainer]:
    """Train three steps at once, and two and then the third; check that both runs are the same.

    Args:
        lost: the step whose checkpoint disappears before the third step.

    Returns:
        The trainers of the whole run and of the last part.
    """

    def trained(name: str, steps: int, *, saves: bool) -> GRPOCareTrainer:
        recipe.trainer.max_steps = steps
        trainer = small_trainer(recipe, ranks, folder / name, saves=saves)
        trainer.fit()
        return trainer

    whole = trained("whole", 3, saves=False)
    trained("parts", 2, saves=True)
    if lost is not None:
        shutil.rmtree(folder / "parts" / "checkpoints" / f"step_{lost:06d}")
    resumed = trained("parts", 3, saves=True)
    first, second = (lines(folder / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert without_timing(first) == without_timing(second)
    files = sorted((folder / "whole" / "rollouts").iterdir())
    assert len(files) == 3
    for file in files:
        assert file.read_text() == (folder / "parts" / "rollouts" / file.name).read_text()
    wanted = weights(whole)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in weights(resumed).items())
    return whole, resumed


def weights(trainer: GRPOCareTrainer) -> dict[str, torch.Tensor]:
    """Return copies of the policy's parameters."""
    return {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}


def one_step(trainer: GRPOCareTrainer, number: int = 1) -> Step:
    """Run a step of the trainer, without recording or saving it."""
    trainer.step = number
    step = Step(number)
    trainer.run_training_step(step)
    return step


def updated(policy: Policy, groups: list[Group]) -> dict[str, float | None]:
    """Return the metrics of an update on these groups."""
    step = Step(1, trained=groups)
    policy.update(step)
    return step.metrics
