"""Parallel layouts, and functions on their ranks that gather results."""

import torch
import torch.distributed as dist

from nemo_care.models.weights import iterate_hf_weights
from nemo_care.ranks.process_groups import Layout, Ranks
from nemo_care.rollouts.generator import Sampling

# With the number of replicas of each.
LAYOUTS = {
    "tp1": (Layout(), 1),
    "tp2": (Layout(tensor=2), 1),
    "tp2_sequence_parallel": (Layout(tensor=2, sequence_parallel=True), 1),
    "pp2": (Layout(pipeline=2), 1),
    "dp2": (Layout(), 2),
    "tp2_pp2_sequence_parallel": (Layout(tensor=2, pipeline=2, sequence_parallel=True), 1),
}

# Of models with experts: shared by two replicas, by the ranks of one, each cut in two besides.
EXPERT_LAYOUTS = {
    "ep2": (Layout(expert=2), 2),
    "tp2_ep2_sequence_parallel": (Layout(tensor=2, sequence_parallel=True, expert=2), 1),
    "tp2_ep2_etp2_sequence_parallel": (
        Layout(tensor=2, sequence_parallel=True, expert=2, expert_tensor=2),
        2,
    ),
}


def gather_weights(model, *, trained_only: bool = False) -> dict[str, torch.Tensor]:
    """Gather Hugging Face's names and tensors, on the CPU, from all pipeline stages."""
    weights = iterate_hf_weights(model, trained_only=trained_only)
    mine = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: tensor for part in everyone for name, tensor in part.items()}


def gather_gradients(model) -> dict[str, torch.Tensor]:
    """Gather the complete gradient, before clipping, under Hugging Face's names."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.clone()
    gradients = gather_weights(model, trained_only=True)
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    return gradients


def reduce_whole_gradients(config) -> None:
    """Make the distributed optimizer reduce complete gradients, not only each rank's part."""
    finalize = config.finalize_model_grads_func
    config.finalize_model_grads_func = lambda *args, **kwargs: finalize(
        *args, **{**kwargs, "force_all_reduce": True}
    )


def record_gradients(policy) -> dict[str, torch.Tensor]:
    """Fill the returned dictionary at the policy's next optimizer step."""
    reduce_whole_gradients(policy.wrapped.config)
    recorded: dict[str, torch.Tensor] = {}
    step = policy.optimizer.step

    def recording_step():
        recorded.update(gather_gradients(policy.model))
        policy.optimizer.step = step
        return step()

    policy.optimizer.step = recording_step
    return recorded


def held_by_leader(groups: list, ranks: Ranks) -> list:
    """The groups; as in a run, only the leader of a replica has the frames of their prompts."""
    if not ranks.is_model_leader:
        for group in groups:
            group.prompt = group.prompt.without_frames()
    return groups


def share_of(items: list, ranks: Ranks) -> list:
    """Return the items of this rank's replica."""
    size = len(items) // ranks.data_size
    return items[ranks.data_rank * size : (ranks.data_rank + 1) * size]


def generate(
    trainer, prompts, temperature: float, ranks: Ranks, *, generator=None
) -> list[list[list[int]]]:
    """Tokens of two completions of each prompt, from all replicas."""
    groups = (generator or trainer.generator).generate(
        share_of(prompts, ranks),
        Sampling(group_size=2, temperature=temperature, top_p=0.95, max_tokens=16, seed=(7,)),
    )
    tokens = [[c.token_ids.tolist() for c in group.completions] for group in groups]
    return [item for part in ranks.gather_from_replicas(tokens) for item in part]


def gather_vocabulary(logits, ranks: Ranks):
    """Return logits [B, S, V] of the last stage, its vocabulary slices joined, on rank 0."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, logits)
    parts = [part for part in everyone if part is not None][: ranks.layout.tensor]
    return torch.cat(parts, dim=-1)
