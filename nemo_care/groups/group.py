"""A group: one prompt and its G completions, the unit of work after sampling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from nemo_care.data.prompts import Prompt
from nemo_care.objective.text import ANSWER_OPEN, extract_answer

T = TypeVar("T")


@dataclass
class Completion:
    """One sampled completion of C tokens, up to and including EOS if it ended.

    `log_probs` float32 [C] are its tokens' in the generator (temperature 1, no top-p).
    `answer_span` is half open, in token indices; None without a well-formed answer. `answer_cuts`
    are the places where the answer can be cut from the reasoning (see `AnswerTokens.cuts`); None:
    only right before the answer's first token. `routing` int16 [C, layers, top_k] are the experts
    that each token went to while it was sampled, `UNRECORDED` for a token that went through no
    layer, such as the last one; None: nothing was recorded.
    """

    token_ids: torch.Tensor
    log_probs: torch.Tensor
    text: str
    ended: bool
    answer_span: tuple[int, int] | None
    answer_cuts: Mapping[int, int] | None = None
    routing: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """C, the number of tokens of the completion."""
        return len(self.token_ids)

    @property
    def has_answer(self) -> bool:
        """Whether the text has a well-formed answer that is not empty."""
        return bool(extract_answer(self.text))

    @property
    def is_unscored(self) -> bool:
        """Whether the tokens of its answer were not found, so that it can't get a likelihood."""
        return self.answer_span is None and self.has_answer

    @property
    def cuts(self) -> Mapping[int, int]:
        """The `answer_cuts` of a completion with an answer."""
        if self.answer_cuts:
            return self.answer_cuts
        assert self.answer_span is not None, "a completion with an answer"
        return {len(ANSWER_OPEN): self.answer_span[0]}


@dataclass
class Group:
    """One prompt, its completions, and the values that each phase of the step computes for them.

    A field is None until its phase has set it, on the ranks listed. All ranks of a model replica
    have the same groups, which differ from those of other replicas. [G] is float32, one value per
    completion.

    Example:
        >>> group = Group(prompt, completions)     # rollouts
        >>> rewards([group])                       # sets rewards and base_reward
        >>> reference.score_answers([group])       # sets answer_likelihood, reference_log_probs
        >>> credit([group])                        # sets consistency_bonus, reward, advantage
    """

    prompt: Prompt
    """Rollouts; all ranks. Its frames are on the leader of the model replica only, and nowhere if
    dynamic sampling has dropped the group."""
    completions: list[Completion]
    """Rollouts; all ranks."""
    prompt_routing: torch.Tensor | None = None
    """Rollouts, with `model.moe.routing_replay`; all ranks. Int16 [P, layers, top_k], the experts
    that the prompt's tokens went to, as `Completion.routing`."""
    rewards: dict[str, torch.Tensor] | None = None
    """Rewards; all ranks. [G] by name, such as accuracy and format, without their weights."""
    base_reward: torch.Tensor | None = None
    """Rewards; all ranks. [G], the weighted sum of the rewards."""
    answer_likelihood: torch.Tensor | None = None
    """Reference, in a run that has one; all ranks. [G], clipped from above, NaN without an answer.
    """
    pair_likelihood: torch.Tensor | None = None
    """Reference, if the bonus needs it; all ranks. [G, G], row: answer, column: reasoning."""
    reference_log_probs: list[torch.Tensor] | None = None
    """Reference, in a run that has one; last pipeline stage, which computes the loss. Float32 [C]
    per completion, NaN where not scored: outside the answers, without a KL term."""
    consistency_bonus: torch.Tensor | None = None
    """Credit; all ranks. [G], zeros in a run without a bonus."""
    reward: torch.Tensor | None = None
    """Credit; all ranks. [G], base reward and bonus."""
    advantage: torch.Tensor | None = None
    """Credit; all ranks. [G]."""
    staleness: int = 0
    """Rollouts; all ranks. Optimizer steps between the weights that sampled the completions and
    those from which the update starts."""
    used: bool | None = None
    """Dynamic sampling; all ranks. Whether the step trains on the group; None without it: always.
    """

    @property
    def size(self) -> int:
        """G, the number of completions."""
        return len(self.completions)

    @property
    def accuracy(self) -> torch.Tensor:
        """The unweighted accuracy, float32 [G]; it selects completions and scales their bonus."""
        return known(self.rewards)["accuracy"]


def known(value: T | None) -> T:
    """Return the value of a field, for phases after the one that sets it.

    Raises:
        ValueError: that phase has not run.
    """
    if value is None:
        raise ValueError("this field of the group is set by a phase that has not run")
    return value
