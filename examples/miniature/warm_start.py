"""The warm start: four stages of supervised training that prepare the model for reinforcement.

1. Right reasoning, right answer: the model learns to see, and to look the answer up in the options.
2. Half the prompts without reasoning, half with a reasoning that is often wrong and always
followed:
   adds a short cut from the video, besides answers that read the reasoning.
3. Wrong reasonings that the answer often contradicts: the short cut also works after a reasoning.
4. Reasonings that are often wrong and mostly followed: the initial model of reinforcement learning.

The settings of stage 4 were chosen by their outcome: six candidates (one with another stage 3),
all from build seed 0, were compared by whether 100 steps of GRPO-CARE end with consistent answers.
With the chosen one they did for all of 8 RL seeds, and GRPO's answers were inconsistent for 2 of 2.
The checkpoint therefore shows that the effect can appear, not how often: no other build seed was
tested. All of this was done with Qwen2.5-VL; README.md says what differs for the other families.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from batched import completion_logits, patches, prompt_token_ids
from gate import measure_gate
from nemo_care.miniature.vocabulary import (
    DIRECTION_IDS,
    DIRECTIONS,
    LETTER_IDS,
    OPPOSITE,
    PAD,
    encode,
)
from nemo_care.miniature.world import TEMPLATES, Question, ask, draw_scenes
from nemo_care.process.screen import say

BATCH = 96
REVERSE_QUESTIONS = 0.2
OPPOSITE_WHEN_WRONG = 0.6
RAMP_STEPS = 100
PROMPTS_BETWEEN_STAGES = 128  # of the numbers printed after a stage
FINAL_LEARNING_RATE = 0.05  # of the stage's rate, at the end of a cosine


@dataclass(frozen=True)
class Stage:
    """A stage's data, length and learning rate.

    Data: `right_when_slow` and `right_when_fast` are the shares of right reasonings for speed 1
    and 2, `follows` the share of answers that follow the reasoning (the rest give the truth),
    `empty` the share without a reasoning, answered with the truth.

    A stage with `stop_at` holds its learning rate until the running letter accuracy exceeds it,
    then decays it over `tail` steps; `steps` is the maximum. Without it, the rate follows a cosine
    over `steps`.
    """

    name: str
    steps: int
    learning_rate: float
    letter_weight: float
    direction_weight: float
    right_when_slow: float
    right_when_fast: float
    follows: float
    empty: float = 0.0
    stop_at: float | None = None
    tail: int = 100


STAGES = (
    Stage("1 see and look up", 2500, 1e-3, 6, 3, 1.0, 1.0, 1.0, stop_at=0.95),
    Stage("2 short cut", 2500, 1e-3, 6, 1, 0.5, 0.5, 1.0, empty=0.5, stop_at=0.97),
    Stage("3 contradict", 400, 2e-3, 6, 1, 0.4, 0.2, 0.4, empty=0.3),
    # Right more often than in stage 3: with 0.4 and 0.2 here as well, each of the five candidates
    # had RL seeds for which GRPO-CARE ended with inconsistent answers.
    Stage("4 mostly follow", 200, 1e-3, 4, 6, 0.55, 0.35, 0.75),
)


@dataclass(frozen=True)
class Batch:
    """Prompts with completions to imitate.

    `pixel_values` [N, patches, values], `token_ids` [N, P + C] padded on the right, `weights`
    [N, C]: of each completion token in the loss, 0 on padding.
    """

    pixel_values: Tensor
    token_ids: Tensor
    weights: Tensor


def warm_start(
    model: PreTrainedModel,
    *,
    seed: int,
    scale: float = 1.0,
    stages: Sequence[Stage] = STAGES,
) -> None:
    """Train `model` in place through all stages; prints each stage's numbers.

    `scale` shortens every stage, for tests of the machinery: only 1.0 makes a useful model.
    """
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for stage in stages:
        shortened = replace(
            stage,
            steps=max(1, round(stage.steps * scale)),
            tail=max(1, round(stage.tail * scale)),
        )
        run_stage(model, shortened, generator)
    model.eval()


def run_stage(model: PreTrainedModel, stage: Stage, generator: torch.Generator) -> None:
    """Train `model` in place through one stage with a new optimizer."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.learning_rate, betas=(0.9, 0.98), weight_decay=0.01
    )
    letter_accuracy = 0.0
    learned_at: int | None = None
    step = 0
    progress = tqdm(total=stage.steps, desc=f"warm start {stage.name}", unit="step")
    for step in range(1, stage.steps + 1):
        rate = stage.learning_rate * _rate(stage, step, learned_at)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss, correct = _train_step(model, stage, optimizer, generator)
        letter_accuracy = 0.95 * letter_accuracy + 0.05 * correct
        progress.update()
        progress.set_postfix(loss=f"{loss:.3f}", letters=f"{letter_accuracy:.3f}", refresh=False)
        if stage.stop_at is None:
            continue
        if learned_at is None and letter_accuracy > stage.stop_at:
            learned_at = step
        if learned_at is not None and step - learned_at >= stage.tail:
            break
    progress.close()
    gate = measure_gate(model, prompts=PROMPTS_BETWEEN_STAGES)
    model.train()
    say(
        f"stage {stage.name}: {step} steps, letters right {letter_accuracy:.3f}, "
        f"truth without reasoning {gate.truth_without_reasoning:.3f}, after a wrong reasoning: "
        f"implied letter {gate.implied_letter:.3f}, true letter {gate.true_letter:.3f}"
    )


def _rate(stage: Stage, step: int, learned_at: int | None) -> float:
    """Return the share of the stage's learning rate at `step`, counted from 1."""
    if stage.stop_at is None:
        done = (step - 1) / stage.steps
    elif learned_at is None:
        done = 0.0
    else:
        done = (step - 1 - learned_at) / stage.tail
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return min(1, step / RAMP_STEPS) * (FINAL_LEARNING_RATE + (1 - FINAL_LEARNING_RATE) * cosine)


def _train_step(
    model: PreTrainedModel,
    stage: Stage,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Make one update; returns the weighted loss and the share of correctly predicted letters."""
    batch = draw_batch(model.config.model_type, stage, BATCH, generator)
    completion_tokens = batch.weights.shape[1]
    targets = batch.token_ids[:, -completion_tokens:]
    logits = completion_logits(model, batch.pixel_values, batch.token_ids, completion_tokens)
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    loss = (losses * batch.weights).sum() / batch.weights.sum()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        is_letter = torch.isin(targets, torch.tensor(LETTER_IDS))
        correct = (logits.argmax(-1) == targets)[is_letter].float().mean()
    return loss.item(), correct.item()


def draw_batch(model_type: str, stage: Stage, count: int, generator: torch.Generator) -> Batch:
    """Draw `count` new videos and questions, with the completions of `stage`, for a family."""
    scenes = draw_scenes(count, generator)
    reverse = torch.rand(count, generator=generator) < REVERSE_QUESTIONS
    questions = ask(scenes, generator, reverse=reverse)
    chances = torch.rand(count, 6, generator=generator).tolist()
    prompts = [prompt_token_ids(model_type, question.text) for question in questions]
    completions = [
        encode(draw_completion(stage, question, speed, chance))
        for question, speed, chance in zip(questions, scenes.speed.tolist(), chances, strict=True)
    ]
    longest = max(map(len, completions))
    token_ids = torch.tensor(
        [
            prompt + completion + [PAD] * (longest - len(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
    )
    targets = token_ids[:, -longest:]
    weights = (targets != PAD).float()
    weights[torch.isin(targets, torch.tensor(LETTER_IDS))] = stage.letter_weight
    weights[torch.isin(targets, torch.tensor(DIRECTION_IDS))] = stage.direction_weight
    return Batch(patches(model_type, scenes.frames), token_ids, weights)


def draw_completion(stage: Stage, question: Question, speed: int, chances: Sequence[float]) -> str:
    """Draw a completion by the stage's shares; `chances` are 6 numbers from [0, 1)."""
    empty, right, opposite, side, follows, template = chances
    if empty < stage.empty:
        return f"<think> </think> <answer> {question.solution} </answer> <|im_end|>"
    truth = question.direction
    if right < (stage.right_when_fast if speed == 2 else stage.right_when_slow):
        claimed = truth
    elif opposite < OPPOSITE_WHEN_WRONG:
        claimed = OPPOSITE[truth]
    else:
        perpendicular = [way for way in DIRECTIONS if way not in (truth, OPPOSITE[truth])]
        claimed = perpendicular[int(side * 2)]
    letter = question.implied_letter(claimed) if follows < stage.follows else question.solution
    reasoning = question.reasoning(claimed, int(template * TEMPLATES))
    return f"<think> {reasoning} </think> <answer> {letter} </answer> <|im_end|>"
