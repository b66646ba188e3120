"""Compare GRPO steps of nemo-care and of TRL's GRPOTrainer.

    make bench        # makes .venv-trl and runs this and the other benchmarks
    .venv/bin/python benchmarks/versus_trl.py [--trl-python .venv-trl/bin/python]
        [--sizes 512,64,8 2048,256,8] [--threads 2] [--steps 2]

The same random Qwen2.5-VL checkpoint, one image prompt (TRL takes no videos), the same G and
lengths, one process each, one after the other, float32, no recomputation. beta = 0.04 makes both
compute a reference's log-probabilities of all completion tokens; with beta = 0 neither does.
Rewards are made up in both. A time is the shortest over the steps; TRL's work besides rollout,
reference and update (tokenising, image processing) is in no column.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from made import Size, write_checkpoint
from PIL import Image
from step import GivenPrompts, made_up_rewards

from nemo_care.data.decoding import DecodingWorkers
from nemo_care.data.mixing import TrainingData
from nemo_care.data.prompts import PromptBuilder
from nemo_care.data.samples import Sample
from nemo_care.data.tokenizer import load_tokenizer
from nemo_care.ranks.process_groups import Layout, Ranks
from nemo_care.recipe.schema import Recipe
from nemo_care.runs.files import RunFiles
from nemo_care.training.build import build_trainer
from nemo_care.training.step import Step

# A picture fills about this share of the prompt; the rest is words.
_PICTURE_SHARE = 0.9
# Tokens of the chat template around picture and words.
_TEMPLATE_TOKENS = 8


def draw_picture(file: Path, prompt_tokens: int) -> int:
    """Draw noise whose side is a multiple of 28 pixels; returns its number of tokens."""
    side = int((prompt_tokens * _PICTURE_SHARE) ** 0.5)
    noise = torch.randint(0, 256, (28 * side, 28 * side, 3), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(file)
    return side * side


def our_steps(
    checkpoint: Path, image: Path, words: int, shape: tuple[int, int], beta: float, steps: int,
    ranks: Ranks,
) -> list[dict]:  # fmt: skip
    """Return the same records as those of trl_step.py."""
    tokens, group_size = shape
    recipe = Recipe()
    recipe.trainer.max_steps = steps
    recipe.model.hf_path = str(checkpoint)
    recipe.model.precision.dtype = "fp32"
    recipe.algorithm.group_size = group_size
    recipe.algorithm.prompts_per_step = 1
    recipe.algorithm.kl_coefficient = beta
    recipe.algorithm.consistency.bonus_coefficient = 0.0
    recipe.rollout.max_completion_tokens = tokens
    recipe.rollout.top_p = 1.0
    recipe.data.prompt_template = "{question}"
    recipe.data.image.max_pixels = 28 * 28 * 16384
    sample = Sample("noise", " ".join(f"w{n}" for n in range(words)), "A", images=(image,))
    trainer = build_trainer(
        recipe,
        ranks,
        RunFiles(checkpoint / "run"),
        [],
        training=TrainingData.of([sample]),
        levels={},
        workers=DecodingWorkers.of(recipe.data, leads=False),
    )
    form = trainer.policy.model.family.prompt
    prompt = PromptBuilder(recipe.data, form, load_tokenizer(checkpoint, form)).build(0, sample)
    trainer.rollouts.prompts = GivenPrompts([prompt])
    trainer.rewards = made_up_rewards
    records = []
    for _ in range(steps):
        trainer.step += 1
        step = Step(trainer.step)
        trainer.run_training_step(step)
        (group,) = step.groups
        timing = {phase.short: seconds for phase, seconds in step.timing.items()}
        records.append(
            {
                "rollout": timing["rollout"],
                "reference": timing["scoring"],
                "update": timing["update"],
                "step": timing["step"],
                "prompt_tokens": prompt.length,
                "completion_tokens": sum(c.length for c in group.completions) / group.size,
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trl-python", default=".venv-trl/bin/python")
    parser.add_argument("--sizes", nargs="+", default=["512,64,8", "2048,256,8"], metavar="P,C,G")
    parser.add_argument("--betas", nargs="+", type=float, default=[0.0, 0.04])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    args = parser.parse_args()
    if not Path(args.trl_python).exists():
        sys.exit(f"{args.trl_python} does not exist: make it with `make bench`, or name another")
    ranks = Ranks(Layout(), cpu_threads=args.threads)
    size = Size()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        checkpoint, image, out = work / "checkpoint", work / "noise.png", work / "trl.json"
        write_checkpoint(checkpoint, size)
        print(f"{size}, {args.threads} threads, the best of {args.steps} steps")
        names = ("rollout", "reference", "update")
        print("prompt completion  G  beta        " + "".join(f"{n:>10}" for n in names)
              + " reference+update  (s)")  # fmt: skip
        for text in args.sizes:
            prompt, tokens, group_size = map(int, text.split(","))
            words = prompt - draw_picture(image, prompt) - _TEMPLATE_TOKENS
            for beta in args.betas:
                command = [args.trl_python, str(Path(__file__).with_name("trl_step.py"))]
                values = (checkpoint, image, words, tokens, group_size, beta, args.threads,
                          args.steps, out)  # fmt: skip
                subprocess.run([*command, *map(str, values)], check=True, stdout=subprocess.DEVNULL)
                records = {
                    "TRL": json.loads(out.read_text()),
                    "nemo-care": our_steps(
                        checkpoint, image, words, (tokens, group_size), beta, args.steps, ranks
                    ),
                }
                best = {}
                for who, steps in records.items():
                    best[who] = [min(step[name] for step in steps) for name in names]
                    best[who].append(best[who][1] + best[who][2])
                    shown = "".join(f"{value:>10.3f}" for value in best[who])
                    last = steps[-1]
                    print(
                        f"{last['prompt_tokens']:>6}{last['completion_tokens']:>11.1f}"
                        f"{group_size:>3}{beta:>6}  {who:<10}{shown}",
                        flush=True,
                    )
                pairs = zip(best["TRL"], best["nemo-care"], strict=True)
                ratios = "".join(f"{a / b if b > 1e-3 else float('nan'):>10.2f}" for a, b in pairs)
                print(f"{'':>26}  {'ratio':<10}{ratios}", flush=True)


if __name__ == "__main__":
    main()
