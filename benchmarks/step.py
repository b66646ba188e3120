"""Time a whole training step with and without prompt sharing, by phase, in one process.

    .venv/bin/python benchmarks/step.py [--sizes 512,64,8 2048,256,8] [--threads 2] [--repeats 2]

The trainer's own phases on given prompts (half of their tokens video): rollout, rewards, scoring,
update. A random model writes no answers and rarely ends a completion, so the sampled completions
are cut to C tokens, an answer is put near their end, and rewards are made up. The ideal ratio of
the update is computed from FLOPs.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from made import Size, answer_span, hf_config, lengths, video_prompt, write_checkpoint

from nemo_care.data.decoding import DecodingWorkers
from nemo_care.data.mixing import TrainingData
from nemo_care.data.prompts import Prompt
from nemo_care.data.samples import Sample
from nemo_care.groups.group import Group
from nemo_care.models.families.qwen2_5_vl.family import Qwen25VLFamily
from nemo_care.planning.work import group_flops, head_flops
from nemo_care.ranks.process_groups import Layout, Ranks
from nemo_care.recipe.schema import Recipe
from nemo_care.runs.files import RunFiles
from nemo_care.training.build import build_trainer
from nemo_care.training.step import Step
from nemo_care.training.trainer import GRPOCareTrainer

PHASES = ("rollout", "reward", "scoring", "update", "step")


class GivenPrompts:
    """Replaces the training stream."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self.prompts = prompts

    def next_step(self):
        return self.prompts, []


def made_up_rewards(groups: list[Group]) -> None:
    """Replace the rewards: an answer in every completion, and every second one right."""
    for group in groups:
        for completion in group.completions:
            completion.answer_span = answer_span(completion.length)
        accuracy = (torch.arange(group.size) % 2).float()
        group.rewards = {"accuracy": accuracy, "format": torch.ones(group.size)}
        group.base_reward = accuracy + 1


def made_trainer(
    checkpoint: Path,
    ranks: Ranks,
    size: tuple[int, int, int],
    prompts: int,
    *,
    shared: bool,
    freeze: Sequence[str] = (),
) -> GRPOCareTrainer:
    """Build a trainer of the checkpoint on prompts of that size; see `model.freeze`."""
    prompt_tokens, completion_tokens, group_size = size
    recipe = Recipe()
    recipe.trainer.max_steps = 1000
    recipe.model.hf_path = str(checkpoint)
    recipe.model.precision.dtype = "fp32"
    recipe.model.freeze = list(freeze)
    recipe.algorithm.group_size = group_size
    recipe.algorithm.prompts_per_step = prompts
    recipe.algorithm.shared_prompt = shared
    recipe.rollout.max_completion_tokens = completion_tokens
    recipe.rollout.top_p = 1.0
    trainer = build_trainer(
        recipe,
        ranks,
        RunFiles(checkpoint / "run"),
        [],
        training=TrainingData.of([Sample("none", "", "A")] * prompts),
        levels={},
        workers=DecodingWorkers.of(recipe.data, leads=False),
    )
    config = trainer.policy.model.family.hf
    trainer.rollouts.prompts = GivenPrompts(
        [video_prompt(config, prompt_tokens, index) for index in range(prompts)]
    )
    trainer.rewards = made_up_rewards
    return trainer


def timings(trainer: GRPOCareTrainer, repeats: int) -> tuple[dict[str, float], float]:
    """Return the shortest time of each phase, in seconds, and the mean length of completions."""
    best: dict[str, float] = {}
    for _ in range(repeats):
        trainer.step += 1
        step = Step(trainer.step)
        trainer.run_training_step(step)
        for phase, seconds in step.timing.items():
            best[phase.short] = min(best.get(phase.short, seconds), seconds)
    lengths = [c.length for group in step.groups for c in group.completions]
    return best, sum(lengths) / len(lengths)


def update_flops(size: Size, shape: tuple[int, int, int], *, shared: bool) -> float:
    """Return the FLOPs of one group's forward and backward (which computes the logits again)."""
    prompt, completion, group = shape
    family, rows = Qwen25VLFamily(hf_config(size)), group * completion
    forward = group_flops(family, lengths(prompt, completion), group, shared=shared, rows=rows)
    return 3 * forward + head_flops(family.architecture, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["512,64,8", "2048,256,8"], metavar="P,C,G")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=1, help="prompts per step")
    args = parser.parse_args()
    ranks = Ranks(Layout(), cpu_threads=args.threads)
    size = Size()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder)
        write_checkpoint(checkpoint, size)
        print(f"{size}, {args.threads} threads, {args.prompts} prompts a step")
        print(
            f"{'P':>5}{'C':>5}{'G':>3}  prompt    " + "".join(f"{p:>9}" for p in PHASES) + "  (s)"
        )
        for text in args.sizes:
            prompt, completion, group = map(int, text.split(","))
            shape = (prompt, completion, group)
            results = {}
            for name, shared in (("shared", True), ("copied", False)):
                trainer = made_trainer(checkpoint, ranks, shape, args.prompts, shared=shared)
                results[name], length = timings(trainer, args.repeats)
                del trainer
                print(
                    f"{prompt:>5}{completion:>5}{group:>3}  {name:<10}"
                    + "".join(f"{results[name][phase]:>9.3f}" for phase in PHASES)
                    + f"  mean length {length:.1f}",
                    flush=True,
                )
            ideal = update_flops(size, shape, shared=False) / update_flops(size, shape, shared=True)
            print(
                f"{prompt:>5}{completion:>5}{group:>3}  {'ratio':<10}"
                + "".join(
                    f"{results['copied'][phase] / max(results['shared'][phase], 1e-9):>9.2f}"
                    for phase in PHASES
                )
                + f"  ideal of the update {ideal:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
