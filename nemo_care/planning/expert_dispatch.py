"""Tokens on their way to experts, where only shapes exist: every expert gets the same number."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher


@contextmanager
def balanced_experts() -> Iterator[None]:
    """Distribute tokens evenly instead of reading the router's choice."""
    with (
        patch.object(MoEAlltoAllTokenDispatcher, "preprocess", _preprocess),
        patch.object(token_dispatcher, "permute", _permute),
    ):
        yield


def forget_dispatch(model: torch.nn.Module) -> None:
    """Free what the dispatchers keep of their last pass until the next one."""
    for module in model.modules():
        dispatcher = getattr(module, "token_dispatcher", None)
        if dispatcher is not None:
            for name in ("probs", "routing_map", "reversed_local_input_permutation_mapping"):
                setattr(dispatcher, name, None)


def _evenly(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _preprocess(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
    """As `MoEAlltoAllTokenDispatcher.preprocess`, for a rank that gets as much as it sends."""
    self.num_out_tokens = routing_map.shape[0] * self.config.moe_router_topk
    from_each = _evenly(self.num_out_tokens, self.ep_size)
    if self.ep_size > 1 or self.tp_size > 1:
        self.input_splits = self.output_splits = np.array(from_each)
        self.output_splits_tp = np.array([self.num_out_tokens] * self.tp_size)
    rows = [_evenly(count, self.num_local_experts) for count in from_each] * self.tp_size
    counts = torch.tensor(rows, device="cpu")
    self.num_global_tokens_per_local_expert = counts
    return counts.sum(dim=0)


def _permute(
    tokens: torch.Tensor,
    routing_map: torch.Tensor,
    probs: torch.Tensor | None = None,
    num_out_tokens: int | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """As Megatron's `permute`, whose result has `num_out_tokens` rows."""
    assert num_out_tokens is not None
    places = torch.empty(num_out_tokens, dtype=torch.long, device=tokens.device)
    if probs is not None:
        probs = probs.T.contiguous().view(-1).index_select(0, places)
    return tokens.index_select(0, places), probs, places
