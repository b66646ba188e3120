"""The table of consistency bonuses for `algorithm.consistency.kind`.

A new bonus is a function here (or anywhere) and an entry in `BONUSES`; its name is then a choice of
the recipe. The formulas themselves are in consistency.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from nemo_care.objective.consistency import (
    accurate_bonus,
    consistency_bonus,
    counterfactual_bonus,
    dense_bonus,
)


@dataclass(frozen=True)
class BonusInputs:
    """The inputs of bonuses, for B groups of G completions.

    `accuracy` [B, G] in [0, 1]. `answer_likelihood` [B, G] under the reference, NaN without an
    answer. `pair_likelihood` [B, G, G] (row: answer, column: reasoning), only for bonuses that
    need it.
    """

    accuracy: Tensor
    answer_likelihood: Tensor
    pair_likelihood: Tensor | None = None


class BonusKeys(Protocol):
    """The recipe's keys under `algorithm.consistency` that bonuses read."""

    bonus_coefficient: float
    margin: float
    likelihood_clip: float
    accuracy_threshold: float
    counterfactual_share: float


@dataclass(frozen=True)
class Bonus:
    """One kind of consistency bonus.

    `compute` returns the bonus [B, G]. `needs_pairs`: the scoring pass also scores every answer
    given every reasoning of its group. `selects`: the bonus should differ among equally accurate
    completions, so that a warning is useful if it never does.
    """

    compute: Callable[[BonusInputs, BonusKeys], Tensor]
    needs_pairs: bool = False
    selects: bool = True


def _group(inputs: BonusInputs, keys: BonusKeys) -> Tensor:
    """The paper's bonus (arXiv 2506.16141, steps 4 and 5)."""
    return consistency_bonus(
        inputs.accuracy,
        inputs.answer_likelihood,
        bonus_coefficient=keys.bonus_coefficient,
        consistency_margin=keys.margin,
        likelihood_clip=keys.likelihood_clip,
        accuracy_threshold=keys.accuracy_threshold,
    )


def _accurate(inputs: BonusInputs, keys: BonusKeys) -> Tensor:
    return accurate_bonus(
        inputs.accuracy,
        inputs.answer_likelihood,
        bonus_coefficient=keys.bonus_coefficient,
        accuracy_threshold=keys.accuracy_threshold,
    )


def _dense(inputs: BonusInputs, keys: BonusKeys) -> Tensor:
    return dense_bonus(
        inputs.answer_likelihood,
        bonus_coefficient=keys.bonus_coefficient,
        likelihood_clip=keys.likelihood_clip,
    )


def _counterfactual(inputs: BonusInputs, keys: BonusKeys) -> Tensor:
    """The leave-one-out counterfactual bonus, mixed with the paper's by `counterfactual_share`."""
    if inputs.pair_likelihood is None:
        raise ValueError("the counterfactual bonus needs pair_likelihood")
    counterfactual = counterfactual_bonus(
        inputs.pair_likelihood, bonus_coefficient=keys.bonus_coefficient
    )
    share = keys.counterfactual_share
    return share * counterfactual + (1 - share) * _group(inputs, keys)


BONUSES: dict[str, Bonus] = {
    "group": Bonus(_group),
    "accurate": Bonus(_accurate, selects=False),
    "dense": Bonus(_dense),
    "counterfactual": Bonus(_counterfactual, needs_pairs=True),
}
"""By name in `algorithm.consistency.kind`."""
