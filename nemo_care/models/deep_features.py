"""Features of the vision tower that reach into the language model's first layers (DeepStack).

A tower may give more than the features that replace the embeddings of the vision tokens: one more
level of them for each of the first layers of the language model, added to the hidden states of the
same tokens after that layer. Completions and text have none.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor


@dataclass(frozen=True)
class DeepFeatures:
    """`levels` [D, N, H] for the N vision tokens of a micro-batch.

    `places` long [N] are their `vision_places` in hidden states [S, B, H], as in `ModelInputs`.
    """

    levels: torch.Tensor
    places: torch.Tensor

    def of_this_rank(self, tokens: int) -> "DeepFeatures":
        """Those of the `tokens` (S / TP * B) hidden states that sequence parallelism leaves here.

        Each rank has the gradient of its own tokens only. The vision tower, which is whole on every
        rank, needs that of all of them: backward sums the ranks' parts.
        """
        levels = copy_to_tensor_model_parallel_region(self.levels)
        first = parallel_state.get_tensor_model_parallel_rank() * tokens
        here = ((self.places >= first) & (self.places < first + tokens)).nonzero()[:, 0]
        return DeepFeatures(levels.index_select(1, here), self.places[here] - first)

    def arguments(self) -> dict[str, torch.Tensor]:
        """As arguments of Megatron's layers.

        Its full recomputation gives a gradient to what a layer gets as an argument and to nothing
        else. A decoder's layers do not use these two otherwise, and each hands the first one on.
        """
        return {"context": self.levels, "context_mask": self.places}


class DeepFeatureLayer(TransformerLayer):
    """A layer that adds the first level of its `DeepFeatures` and hands on the others."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        *arguments: Any,
        context: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        **more: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `TransformerLayer.forward`; `context` are levels [D, N, H], `context_mask` places."""
        hidden_states, _ = super().forward(hidden_states, *arguments, **more)
        if context is None or context_mask is None:
            return hidden_states, None
        flat = hidden_states.flatten(0, 1)
        flat = flat.index_add(0, context_mask, context[0].to(flat.dtype))
        # The pipeline frees what a stage sends, which must be no view.
        hidden_states = make_viewless_tensor(
            flat.view_as(hidden_states), requires_grad=flat.requires_grad, keep_graph=True
        )
        return hidden_states, context[1:] if len(context) > 1 else None


def take_deep_features(spec: TransformerBlockSubmodules, levels: int) -> None:
    """Make the first `levels` layers of a first pipeline stage add deep features."""
    for number, layer in enumerate(spec.layer_specs[:levels]):
        spec.layer_specs[number] = replace(layer, module=DeepFeatureLayer)
