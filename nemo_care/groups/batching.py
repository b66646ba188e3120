"""Turn groups into micro-batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_care.groups.batch import GroupBatch
from nemo_care.groups.group import Group
from nemo_care.groups.packed import packed_groups
from nemo_care.groups.separate import separate_sequences
from nemo_care.models.precision import token_multiple
from nemo_care.ranks.process_groups import Layout
from nemo_care.recipe.model import FP8Config
from nemo_care.recipe.schema import Recipe

# For packed groups in any precision; some 8-bit recipes require more.
_PACKED_MULTIPLE = 16


@dataclass(frozen=True)
class BatchLayout:
    """How groups are turned into micro-batches.

    A micro-batch has `groups_per_batch` groups. With `shared_prompt`, each group is one sequence
    that contains its prompt once; otherwise each completion is a separate sequence. Sequences
    are padded with `pad_id` to a multiple of `multiple` tokens.
    """

    groups_per_batch: int
    pad_id: int
    shared_prompt: bool = True
    multiple: int = 1

    @classmethod
    def of(
        cls,
        parallel: Layout,
        groups_per_batch: int,
        pad_id: int,
        *,
        shared_prompt: bool,
        fp8: FP8Config | None = None,
    ) -> "BatchLayout":
        """Return a layout with lengths that suit sequence parallelism and 8-bit products."""
        scattered = parallel.tensor if parallel.sequence_parallel else 1
        multiple = math.lcm(scattered, token_multiple(fp8, parallel))
        if shared_prompt:
            multiple = math.lcm(multiple, _PACKED_MULTIPLE)
        return cls(groups_per_batch, pad_id, shared_prompt, multiple)

    @classmethod
    def of_recipe(
        cls, recipe: Recipe, parallel: Layout, pad_id: int, *, groups_per_batch: int | None = None
    ) -> "BatchLayout":
        """Return the layout in which a recipe trains, validates and is replayed.

        `groups_per_batch` defaults to the recipe's.
        """
        algorithm = recipe.algorithm
        return cls.of(
            parallel,
            groups_per_batch or algorithm.groups_per_micro_batch,
            pad_id,
            shared_prompt=algorithm.shared_prompt,
            fp8=recipe.model.precision.fp8,
        )

    def batches(self, groups: Sequence[Group], *, answer_pairs: bool = False) -> list[GroupBatch]:
        """Return the groups as micro-batches, with `answer_pairs` for `pair_likelihoods`.

        Raises:
            ValueError: answer pairs were requested without a shared prompt.
        """
        if answer_pairs and not self.shared_prompt:
            raise ValueError("answer pairs need the shared-prompt layout")
        size = self.groups_per_batch
        parts = [groups[start : start + size] for start in range(0, len(groups), size)]
        if not self.shared_prompt:
            return [separate_sequences(part, self.pad_id, self.multiple) for part in parts]
        return [
            packed_groups(part, self.pad_id, self.multiple, answer_pairs=answer_pairs)
            for part in parts
        ]
