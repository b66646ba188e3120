"""Packed groups against separate sequences in one parallel layout; one process per rank.

    python tests/helpers/packed_program.py WORK_FOLDER NAME

WORK_FOLDER/job.pt says what to do; rank 0 writes WORK_FOLDER/packed-NAME.pt: for each way of
recomputation, and for packed groups, separate sequences and packed groups under a plain causal mask
(the negative control), the logits that predict the completions, their log-probabilities, the answer
likelihoods and the gradients.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from layout_program import (
    LAYOUTS,
    gather_gradients,
    gather_vocabulary,
    load_job,
    reduce_whole_gradients,
)
from small_runs import small_recipe

from nemo_care.groups.batching import BatchLayout
from nemo_care.megatron.optimizer import wrap_data_parallel
from nemo_care.models.pipeline import forward_backward, forward_only
from nemo_care.objective.consistency import answer_likelihood
from nemo_care.ranks.process_groups import RankEnvironment, Ranks
from nemo_care.scoring.scorer import Scorer
from nemo_care.training.build import load_model


def causal(batch):
    """The same packed sequence without its segments."""
    return dataclasses.replace(batch, rows=dataclasses.replace(batch.rows, packed=None))


def from_last_stage(value, ranks: Ranks):
    """The last pipeline stage's value, on every rank."""
    everyone = [None] * ranks.world_size
    dist.all_gather_object(everyone, value if ranks.is_last_stage else None)
    return next(value for value in everyone if value is not None)


def compute(wrapped, batches, ranks: Ranks) -> dict:
    """Values and gradients of one layout of the groups."""
    model = wrapped.module

    def values(hidden, batch):
        log_probs = batch.log_probs(model, hidden, batch.mask)
        logits = model.logits(hidden).transpose(0, 1).flatten(0, 1)[batch.places[batch.mask]]
        likelihood = answer_likelihood(log_probs, batch.answer_mask)
        return log_probs, likelihood, logits

    def loss(hidden, batch):
        log_probs = batch.log_probs(model, hidden, batch.mask)
        # Factors of both signs, another for every token.
        factors = torch.sin(torch.arange(log_probs.numel()).view_as(log_probs).float())
        return (log_probs * factors).sum(), None

    def inputs(batch):
        return batch.rows.inputs(model)

    passes = forward_only(model, batches, inputs, values)
    vocabulary = [gather_vocabulary(part, ranks) for part in _last_of(passes, len(batches))]
    wrapped.train()
    wrapped.zero_grad_buffer()
    forward_backward(wrapped, batches, inputs, loss)
    return {
        "log_probs": from_last_stage([part for part, _, _ in passes], ranks),
        "likelihood": from_last_stage([part for _, part, _ in passes], ranks),
        "logits": vocabulary,
        "gradients": gather_gradients(model),
    }


def _last_of(passes: list, count: int) -> list:
    return [logits for _, _, logits in passes] or [None] * count


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    ranks = Ranks(LAYOUTS[name], RankEnvironment.read())
    job = load_job(folder, ranks)
    recipe = small_recipe(job["checkpoint"], job["world"])
    packed, separate = (
        # Two groups in a batch.
        BatchLayout.of(ranks.layout, 2, pad_id=0, shared_prompt=shared)
        for shared in (True, False)
    )
    results: dict = {}
    for recompute in ("none", "selective", "full"):
        recipe.model.recompute_granularity = recompute
        wrapped = wrap_data_parallel(load_model(recipe, ranks))
        reduce_whole_gradients(wrapped.config)
        results[recompute] = {
            "packed": compute(wrapped, packed.batches(job["groups"]), ranks),
            "separate": compute(wrapped, separate.batches(job["groups"]), ranks),
        }
    control = [causal(batch) for batch in packed.batches(job["groups"])]
    results["control"] = compute(wrapped, control, ranks)
    results["pairs"] = Scorer(wrapped.module, ranks, packed).pair_likelihoods(job["groups"])
    for group in job["groups"]:
        group.completions = [
            dataclasses.replace(completion, answer_span=None) for completion in group.completions
        ]
    scorer = Scorer(wrapped.module, ranks, packed)
    results["unanswered"] = scorer.answer_likelihoods(job["groups"])
    if ranks.rank == 0:
        torch.save(results, folder / f"packed-{name}.pt")
    ranks.close()


if __name__ == "__main__":
    main()
