"""Check that a separate generator and the model that it samples from agree on the same tokens."""

from collections.abc import Sequence

import torch

from nemo_care.errors import RunFailed
from nemo_care.groups.batch import GroupBatch
from nemo_care.groups.group import Group
from nemo_care.scoring.scorer import Scorer, Table, per_group


def check_agreement(scorer: Scorer, groups: Sequence[Group], bound: float) -> None:
    """Compare sampled log-probabilities with the model's own; all ranks of the replica call it.

    In training every step does this; without it, an evaluation would accept the output of an engine
    with wrong weights or positions.

    Raises:
        RunFailed: they differ by more than `bound` on average.
    """

    def differences(batch: GroupBatch, log_probs: torch.Tensor) -> list[Table]:
        apart = torch.where(batch.mask, (batch.rollout_log_probs() - log_probs).abs(), 0.0)
        return per_group(batch, apart.sum(1))

    tables = scorer.score(groups, differences, rows=1, all_tokens=True)
    tokens = sum(completion.length for group in groups for completion in group.completions)
    mean = float(sum(table.sum() for table in tables)) / max(tokens, 1)
    # NaN is rejected too.
    if not mean <= bound:
        raise RunFailed(
            f"log-probabilities of the first samples' tokens differ by {mean:.4f} on average "
            "between vLLM and the model itself, more than rollout.max_logprob_difference="
            f"{bound}: weights or positions are wrong on one side"
        )
