"""Dynamic sampling: a step continues to sample until enough groups have a signal.

Q. Yu et al., "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", arXiv 2503.14476,
section 3.2. A group whose rewards are all equal has advantages of 0 and teaches nothing, so the
effective batch shrinks as the policy becomes consistently right (or wrong).

DAPO decides by the accuracy. Here the advantage decides, after the scoring pass, because the
consistency bonus can distinguish completions that are all right. The groups kept depend on the
order of the training stream alone, so every parallel layout trains on the same groups.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from enum import IntEnum
from typing import NamedTuple

import torch

from nemo_care.groups.group import Group, known
from nemo_care.megatron.cpu import compute_device
from nemo_care.ranks.process_groups import Ranks
from nemo_care.recipe.schema import Recipe
from nemo_care.runs import metrics as m
from nemo_care.training.finite import reference_is_finite, rollout_is_finite
from nemo_care.training.step import Step


class _Worth(IntEnum):
    """How useful a group is to the update; lower values are taken first."""

    # Never dropped: the update must see it, so that it skips the step and reports why.
    NOT_FINITE = 0
    SIGNAL = 1
    NO_SIGNAL = 2


class _Candidate(NamedTuple):
    """A group of any replica; smaller ones are taken first."""

    worth: _Worth
    prompt_index: int
    replica: int


class DynamicSampling:
    """Repeats sampling until `algorithm.prompts_per_step` groups have a signal."""

    def __init__(self, recipe: Recipe, ranks: Ranks) -> None:
        """Without rollout.dynamic_sampling, train on all groups of a single round."""
        self.config = recipe.rollout.dynamic_sampling
        self.wanted = recipe.algorithm.prompts_per_step
        self.all_tokens = recipe.algorithm.kl_coefficient > 0
        self.ranks = ranks

    def rounds(self, step: Step, sample: Callable[[Step], list[Group]]) -> Iterator[list[Group]]:
        """Yield the groups of each round until enough have a signal.

        The caller sets their advantages before the next round. Afterwards the step has its
        `groups`, the `trained` ones among them, and metrics. Collective over all ranks, which run
        the same number of rounds.
        """
        if not self.config.enabled:
            step.groups = step.trained = sample(step)
            yield step.groups
            return
        mine: dict[int, Group] = {}
        candidates: list[_Candidate] = []
        chosen: list[_Candidate] = []
        rounds = 0
        while rounds < self.config.max_rounds:
            rounds += 1
            new = sample(step)
            yield new
            mine |= {group.prompt.index: group for group in new}
            candidates += self._candidates(new)
            chosen = sorted(candidates)[: self.wanted]
            _mark(mine.values(), chosen)
            # A step that will be left out needs no further groups.
            if chosen[0].worth is _Worth.NOT_FINITE or chosen[-1].worth is _Worth.SIGNAL:
                break
        step.groups = list(mine.values())
        step.trained = self._dealt(chosen, mine)
        step.metrics |= {
            m.ROUNDS: rounds,
            m.GROUPS_SAMPLED: len(candidates),
            m.SET_ASIDE: len(candidates) - len(chosen),
        }

    def _candidates(self, groups: Sequence[Group]) -> list[_Candidate]:
        """Return this round's groups of all replicas."""
        # Only the last stage has the reference's log-probabilities.
        worth = torch.tensor([self._worth(group) for group in groups], device=compute_device())
        self.ranks.broadcast_from_loss_leader(worth)
        indices = [group.prompt.index for group in groups]
        everyone = self.ranks.gather_from_replicas(list(zip(worth.tolist(), indices, strict=True)))
        return [
            _Candidate(_Worth(worth), index, replica)
            for replica, items in enumerate(everyone)
            for worth, index in items
        ]

    def _worth(self, group: Group) -> int:
        scored = reference_is_finite([group], all_tokens=self.all_tokens)
        if not (rollout_is_finite([group]) and scored):
            return _Worth.NOT_FINITE
        return _Worth.SIGNAL if bool((known(group.advantage) != 0).any()) else _Worth.NO_SIGNAL

    def _dealt(self, chosen: Sequence[_Candidate], mine: Mapping[int, Group]) -> list[Group]:
        """Return this replica's share of the chosen groups; replicas pass on their surplus.

        Each replica gets the same number; how many of them it has sampled itself is chance.
        """
        share = self.wanted // self.ranks.data_size
        kept: list[list[int]] = [[] for _ in range(self.ranks.data_size)]
        spare: list[tuple[int, int]] = []
        for _, index, replica in sorted(chosen, key=lambda candidate: candidate.prompt_index):
            if len(kept[replica]) < share:
                kept[replica].append(index)
            else:
                spare.append((index, replica))
        lacking = [to for to, indices in enumerate(kept) for _ in range(share - len(indices))]
        moves = [(source, to) for (_, source), to in zip(spare, lacking, strict=True)]
        given = [mine[index] for index, source in spare if source == self.ranks.data_rank]
        received = self._moved(moves, given)
        own = [mine[index] for index in kept[self.ranks.data_rank]]
        return sorted([*own, *received], key=lambda group: group.prompt.index)

    def _moved(self, moves: Sequence[tuple[int, int]], given: Sequence[Group]) -> list[Group]:
        """Return the groups that this replica receives; frames travel as tensors of bytes."""
        bare = [replace(group, prompt=group.prompt.without_frames()) for group in given]
        received = self.ranks.move_between_replicas(moves, bare)
        if self.ranks.is_model_leader:
            frames = self.ranks.move_tensors_between_replicas(
                moves,
                [group.prompt.frames for group in given],
                [group.prompt.frames for group in received],
            )
            for group, arrived in zip(received, frames, strict=True):
                group.prompt = replace(group.prompt, frames=tuple(arrived))
        return received


def _mark(groups: Iterable[Group], chosen: Sequence[_Candidate]) -> None:
    """Mark each group so far with whether the step would train on it.

    A group that is not among the first now never will be, and is only recorded. Its media are
    dropped, since they would fill the memory in the remaining rounds.
    """
    indices = {candidate.prompt_index for candidate in chosen}
    for group in groups:
        group.used = group.prompt.index in indices
        if not group.used:
            group.prompt = group.prompt.without_frames()
