"""Which experts the tokens of a pass go to: the router's own choice, or one recorded earlier.

Rounding differs between sampling and training, and a router that is nearly undecided then sends a
token to other experts: its log-probability jumps. Therefore the experts of each token and layer are
recorded while completions are sampled, and the update uses them. The weights of these experts are
still computed, with gradients, from the router's logits.
W. Ma et al., "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers",
arXiv 2510.11370.

A pass's object travels to each layer as an argument, so that a layer that is recomputed in backward
finds the experts of its own micro-batch, whichever others have been forwarded since.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer

from nemo_care.models.architecture import UNRECORDED

# An argument of Megatron's layers that reaches them unchanged, also when they are recomputed, and
# that no layer of ours uses.
_ARGUMENT = "attention_bias"


class Routing(Protocol):
    """What decides on the experts of the T tokens of one pass on this rank."""

    def choose(self, layer: int, own: torch.Tensor, experts: int) -> torch.Tensor:
        """Return the experts [T, top_k] of each token.

        `own` [T, top_k] is the router's choice among its number of `experts`; `layer` counts from
        the stage's first one.
        """
        ...


@dataclass
class RecordedPass:
    """A pass that remembers the router's choice: int16 [T, top_k] by layer of this stage."""

    by_layer: dict[int, torch.Tensor] = field(default_factory=dict)

    def choose(self, layer: int, own: torch.Tensor, experts: int) -> torch.Tensor:
        """Keep and return the router's choice."""
        self.by_layer[layer] = own.to(torch.int16)
        return own

    def experts(self) -> torch.Tensor:
        """Return the choices int16 [T, layers of this stage, top_k]."""
        return torch.stack([self.by_layer[layer] for layer in sorted(self.by_layer)], dim=1)


@dataclass
class RoutingCounts:
    """What a `TrainingPass` has counted, by layer of this stage.

    `loads` float32 [E]: the tokens of each expert. `different`: those of the `recorded` tokens,
    which have recorded experts, for which the router would choose others. A layer that is
    recomputed sets them again.
    """

    recorded: torch.Tensor
    loads: dict[int, torch.Tensor] = field(default_factory=dict)
    different: dict[int, torch.Tensor] = field(default_factory=dict)


class TrainingPass:
    """A pass that uses recorded experts where there are some, and counts."""

    def __init__(self, counted: torch.Tensor, recorded: torch.Tensor | None) -> None:
        """`counted` float32 [T] is 1 for tokens and 0 for padding.

        `recorded` int16 [T, layers of this stage, top_k] is `UNRECORDED` where the router decides;
        None: it decides everywhere.
        """
        self._counted = counted
        self._recorded = recorded
        has_some = counted.new_zeros(()) if recorded is None else recorded[:, 0, 0] != UNRECORDED
        self.counts = RoutingCounts(has_some.sum())

    def choose(self, layer: int, own: torch.Tensor, experts: int) -> torch.Tensor:
        """Return the recorded experts, and the router's for tokens without any."""
        chosen = own
        if self._recorded is not None:
            recorded = self._recorded[:, layer].long()
            has_some = recorded[:, :1] != UNRECORDED
            chosen = torch.where(has_some, recorded, own)
            # Experts have no order.
            differs = (chosen.sort(dim=1).values != own.sort(dim=1).values).any(dim=1)
            self.counts.different[layer] = differs.sum()
        weights = self._counted[:, None].expand_as(chosen)
        loads = torch.zeros(experts, device=chosen.device)
        self.counts.loads[layer] = loads.index_add_(0, chosen.flatten(), weights.flatten())
        return chosen


class _Choice:
    """Takes the place of Megatron's `RouterReplay` in one layer's router.

    Megatron's own gets its experts before each pass, for recomputation in the order in which it
    expects the passes to come back, and is registered in a list of all models of the process.
    """

    def __init__(self, layer: int) -> None:
        self._layer = layer
        self._routing: Routing | None = None

    def take(self, module: Any, arguments: Any, named: dict[str, Any]) -> tuple[Any, Any]:
        """Remember the routing of the pass that enters the layer, and remove it."""
        self._routing = named.pop(_ARGUMENT, None)
        return arguments, named

    def get_replay_topk(
        self, scores: torch.Tensor, topk: int, groups: Any, group_topk: Any, default_topk: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores [T, top_k] and the numbers of the experts to use."""
        values, own = default_topk(scores, topk, groups, group_topk)
        if self._routing is None:
            return values, own
        chosen = self._routing.choose(self._layer, own, scores.shape[1])
        return (values, own) if chosen is own else (scores.gather(1, chosen), chosen)


def let_routing_be_given(layers: Any) -> None:
    """Make this stage's layers that have experts use the `Routing` of a pass (see `arguments`)."""
    for number, layer in enumerate(layers):
        if isinstance(layer.mlp, MoELayer):
            choice = _Choice(number)
            layer.mlp.router.router_replay = choice
            layer.register_forward_pre_hook(choice.take, with_kwargs=True)


def arguments(routing: Routing | None) -> dict[str, Any]:
    """Return the routing of a pass as an argument of its layers."""
    return {} if routing is None else {_ARGUMENT: routing}


def of_all_stages(experts: torch.Tensor) -> torch.Tensor:
    """Return experts int16 [..., layers, top_k] of all layers from those of each stage; collective.

    Stages have equally many layers.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1:
        return experts
    # NCCL and gloo send no integers of 16 bits.
    mine = experts.contiguous().view(torch.uint8)
    parts = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(parts, mine, group=group)
    return torch.cat([part.view(torch.int16) for part in parts], dim=-2)
