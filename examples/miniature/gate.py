"""The forced-reasoning gate: is this warm-started model suitable for reinforcement learning?

The paper's effect needs a model whose answer follows its reasoning most of the time *and* that has
a short cut from the video. Both are measured as the mean probability of a letter after a forced
reasoning. The short cut is planted by the warm start on purpose.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from batched import completion_logits, patches, prompt_token_ids
from nemo_care.miniature.vocabulary import LETTER_IDS, LETTERS, encode
from nemo_care.miniature.world import Question, draw_level, draw_wrong_directions

TRUTH_WITHOUT_REASONING = (0.95, 1.0)
IMPLIED_LETTER = (0.6, 0.8)
TRUE_LETTER = (0.15, 0.35)


class GateNotPassed(RuntimeError):
    """Raised for a warm-started miniature that would not show the paper's effect; names the
    cause."""


@dataclass(frozen=True)
class Gate:
    """The gate's numbers, each a mean probability over prompts.

    `truth_without_reasoning`: of the right letter after an empty reasoning. `implied_letter` and
    `true_letter`: of the letter implied by a forced wrong reasoning, and of the right letter after
    it.
    """

    truth_without_reasoning: float
    implied_letter: float
    true_letter: float

    def failures(self) -> list[str]:
        """Return one sentence for each number outside its range; empty if the gate is passed."""
        ranges = {
            "truth_without_reasoning": TRUTH_WITHOUT_REASONING,
            "implied_letter": IMPLIED_LETTER,
            "true_letter": TRUE_LETTER,
        }
        return [
            f"{name} is {value:.3f}, must be within {ranges[name][0]} to {ranges[name][1]}"
            for name, value in asdict(self).items()
            if not ranges[name][0] <= value <= ranges[name][1]
        ]

    def passes(self) -> bool:
        """Whether every number is in its range."""
        return not self.failures()

    def require(self) -> None:
        """Raise GateNotPassed with the failures unless the gate is passed."""
        failures = self.failures()
        if failures:
            raise GateNotPassed(
                f"the warm start did not pass the forced-reasoning gate: {'; '.join(failures)}; "
                "build again with another seed"
            )


@torch.no_grad()
def letter_probabilities(
    model: PreTrainedModel,
    pixel_values: Tensor,
    questions: list[Question],
    reasonings: list[str],
) -> Tensor:
    """Return the probability of each option letter right after a forced reasoning: [N, 4].

    Raises ValueError unless all reasonings have the same number of words.
    """
    forced = [encode(f"<think> {reasoning} </think> <answer> A") for reasoning in reasonings]
    if len({len(ids) for ids in forced}) != 1:
        raise ValueError("reasonings of different lengths: give all the same template")
    model_type = model.config.model_type
    prompts = [prompt_token_ids(model_type, question.text) for question in questions]
    token_ids = torch.tensor([p + f for p, f in zip(prompts, forced, strict=True)])
    logits = completion_logits(model, pixel_values, token_ids, 1)[:, 0]
    return logits.float().softmax(-1)[:, list(LETTER_IDS)]


def measure_gate(model: PreTrainedModel, *, prompts: int = 512, seed: int = 99) -> Gate:
    """Measure the gate on new level 1 prompts; puts the model into evaluation mode."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    scenes, questions = draw_level("L1", prompts, generator)
    pixel_values = patches(model.config.model_type, scenes.frames)
    wrong = draw_wrong_directions(questions, generator)

    def column(letters: list[str]) -> Tensor:
        return torch.tensor([LETTERS.index(letter) for letter in letters])[:, None]

    right_letter = column([question.solution for question in questions])
    implied = column([q.implied_letter(w) for q, w in zip(questions, wrong, strict=True)])
    empty = letter_probabilities(model, pixel_values, questions, [""] * prompts)
    forced = [q.reasoning(w, template=0) for q, w in zip(questions, wrong, strict=True)]
    misled = letter_probabilities(model, pixel_values, questions, forced)
    return Gate(
        truth_without_reasoning=empty.gather(1, right_letter).mean().item(),
        implied_letter=misled.gather(1, implied).mean().item(),
        true_letter=misled.gather(1, right_letter).mean().item(),
    )
