"""A group: one prompt and its G completions, the unit of work after sampling."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from nemo_care.data.prompts import Prompt
from nemo_care.objective.text import ANSWER_OPEN, extract_answer


@dataclass
class Completion:
    """One sampled completion of C tokens, up to and with EOS where it ended.

    `log_probs` float32 [C]: of its tokens as the generator saw them (temperature 1, no top-p).
    `answer_span` is half open, in token indices; None without a well-formed answer. `answer_cuts`
    say where the answer may be cut from the reasoning (see `AnswerTokens.cuts`); None: right
    before the answer's first token.
    """

    token_ids: torch.Tensor
    log_probs: torch.Tensor
    text: str
    ended: bool
    answer_span: tuple[int, int] | None
    answer_cuts: Mapping[int, int] | None = None

    @property
    def length(self) -> int:
        """C, tokens of the completion."""
        return len(self.token_ids)

    @property
    def has_answer(self) -> bool:
        """Whether the text has a well-formed answer that is not empty."""
        return bool(extract_answer(self.text))

    @property
    def is_unscored(self) -> bool:
        """Whether there is an answer whose tokens were not found: it can't get a likelihood."""
        return self.answer_span is None and self.has_answer

    @property
    def cuts(self) -> Mapping[int, int]:
        """`answer_cuts`, of a completion with an answer."""
        if self.answer_cuts:
            return self.answer_cuts
        assert self.answer_span is not None, "a completion with an answer"
        return {len(ANSWER_OPEN): self.answer_span[0]}


def _unset() -> torch.Tensor:
    return torch.empty(0)


@dataclass
class Group:
    """One prompt, its completions, and what each phase of the step finds out about them.

    Float32 [G] each, filled in this order: `rewards` (by name, such as accuracy and format) and
    `base_reward` (their weighted sum); `answer_likelihood` (the reference; clipped from above, NaN
    without an answer); `consistency_bonus`, `reward`, `advantage`. `pair_likelihood` [G, G] (row:
    answer, column: reasoning) is there for the counterfactual bonus. `reference_log_probs`, one
    float32 [C] per completion with NaN where the reference was not asked (outside the answers,
    unless there is a KL term), and the pairs are known on the last pipeline stage only, where the
    loss is computed. `used` says whether the step trains on the group, None without dynamic
    sampling (it does).
    """

    prompt: Prompt
    completions: list[Completion]
    rewards: dict[str, torch.Tensor] = field(default_factory=dict)
    base_reward: torch.Tensor = field(default_factory=_unset)
    answer_likelihood: torch.Tensor = field(default_factory=_unset)
    pair_likelihood: torch.Tensor | None = None
    reference_log_probs: list[torch.Tensor] | None = None
    consistency_bonus: torch.Tensor = field(default_factory=_unset)
    reward: torch.Tensor = field(default_factory=_unset)
    advantage: torch.Tensor = field(default_factory=_unset)
    used: bool | None = None

    @property
    def size(self) -> int:
        """G, the number of completions."""
        return len(self.completions)

    @property
    def accuracy(self) -> torch.Tensor:
        """Unweighted accuracy, float32 [G], which selects completions and sizes their bonus."""
        return self.rewards["accuracy"]
