"""The metrics of an update's experts: how evenly they are used, and how routing differs."""

from collections.abc import Sequence

import torch

from nemo_care.megatron.cpu import compute_device
from nemo_care.models.architecture import Architecture
from nemo_care.models.expert_routing import RoutingCounts
from nemo_care.ranks.process_groups import Ranks
from nemo_care.runs import metrics as m
from nemo_care.runs.metric import Metric


def expert_metrics(
    passes: Sequence[RoutingCounts], architecture: Architecture, first_layer: int, ranks: Ranks
) -> dict[Metric, float | None]:
    """Return the metrics of this rank's `passes` and those of all others. Collective.

    A layer's load balance is the number of tokens of its busiest expert over the mean of its
    experts. `first_layer` is the number of this stage's first layer.
    """
    assert architecture.experts is not None
    count = architecture.experts.count
    # By layer, over the model: each expert's tokens, and of the tokens with recorded experts those
    # that the router would send elsewhere and all. Ranks of a stage have different tokens.
    table = torch.zeros(architecture.layers, count + 2, device=compute_device())
    for counts in passes:
        for layer, loads in counts.loads.items():
            row = table[first_layer + layer]
            row[:count] += loads
            row[count] += counts.different.get(layer, 0)
            row[count + 1] += counts.recorded
    table = ranks.sum_over_data(ranks.sum_over_model(table)).cpu()
    loads, (different, recorded) = table[:, :count], table[:, count:].sum(dim=0).tolist()
    balance = (loads.amax(dim=1) / loads.mean(dim=1)).tolist()
    found: dict[Metric, float | None] = {
        m.ROUTING_DIFFERENCE: different / recorded if recorded else None,
        m.LOAD_BALANCE: m.LOAD_BALANCE.reduce(balance),
        m.LARGEST_LOAD: m.LARGEST_LOAD.reduce(balance),
    }
    return found | {m.LOAD_OF_LAYER.of(str(layer)): value for layer, value in enumerate(balance)}
