"""What one parallel layout computes; run once per layout, by one process per rank.

    python tests/helpers/layout_program.py WORK_FOLDER NAME

WORK_FOLDER/job.pt says what to do; rank 0 writes WORK_FOLDER/NAME.pt, and the exported checkpoint
goes to WORK_FOLDER/NAME-export.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

from small_runs import one_step, small_recipe, small_trainer, updated

from nemo_care.models.pipeline import forward_only
from nemo_care.models.weights import export_hf, iterate_hf_weights
from nemo_care.ranks.process_groups import Layout, RankEnvironment, Ranks
from nemo_care.rollouts.generator import Sampling

LAYOUTS = {
    "tp1": Layout(),
    "tp2": Layout(tensor=2),
    "tp2_sequence_parallel": Layout(tensor=2, sequence_parallel=True),
    "pp2": Layout(pipeline=2),
    "dp2": Layout(),
    "tp2_pp2_sequence_parallel": Layout(tensor=2, pipeline=2, sequence_parallel=True),
}


def gather_weights(model) -> dict[str, torch.Tensor]:
    """Hugging Face's names and tensors from all pipeline stages."""
    mine = {name: tensor.detach().clone() for name, tensor in iterate_hf_weights(model)}
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: tensor for part in everyone for name, tensor in part.items()}


def gather_gradients(model) -> dict[str, torch.Tensor]:
    """The whole gradient, before clipping, under Hugging Face's names."""
    parameters = list(model.parameters())
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.clone()
    gradients = gather_weights(model)
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    return gradients


def reduce_whole_gradients(config) -> None:
    """The distributed optimizer only reduces each rank's part of a gradient unless told so."""
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


def share_of(items: list, ranks: Ranks) -> list:
    size = len(items) // ranks.data_size
    return items[ranks.data_rank * size : (ranks.data_rank + 1) * size]


def generate(trainer, prompts, temperature: float, ranks: Ranks) -> list[list[list[int]]]:
    groups = trainer.generator.generate(
        share_of(prompts, ranks),
        Sampling(group_size=2, temperature=temperature, top_p=0.95, max_tokens=16, seed=(7,)),
    )
    tokens = [[c.token_ids.tolist() for c in group.completions] for group in groups]
    return [item for part in ranks.gather_from_replicas(tokens) for item in part]


def run(folder: Path, name: str, ranks: Ranks) -> dict:
    job = torch.load(folder / "job.pt", weights_only=False)
    recipe = small_recipe(job["checkpoint"], job["world"])
    trainer = small_trainer(recipe, ranks, folder / name)
    model = trainer.policy.model
    result: dict = {}

    logits = forward_only(
        model.eval(),
        [job["inputs"]],
        inputs_of=lambda inputs: inputs,
        result_of=lambda hidden, inputs: model.logits(hidden),
    )
    result["logits"] = gather_vocabulary(logits[0] if logits else None, ranks)
    result["greedy"] = generate(trainer, job["prompts"], 0.0, ranks)
    result["sampled"] = generate(trainer, job["prompts"], 1.0, ranks)
    export_hf(model, job["checkpoint"], folder / f"{name}-export")

    # One step on given completions.
    groups = share_of(job["groups"], ranks)
    trainer.reference.score_answers(groups)
    trainer.credit(groups)
    gradients = record_gradients(trainer.policy)
    metrics = updated(trainer.policy, groups)
    trainer.reference.track(model, 1)
    rows = [
        (g.answer_likelihood.tolist(), g.consistency_bonus.tolist(), g.advantage.tolist())
        for g in groups
    ]
    rows = [row for part in ranks.gather_from_replicas(rows) for row in part]
    result["golden"] = {
        "rows": rows,
        "loss": metrics["train/loss"],
        "grad_norm": metrics["train/grad_norm"],
        "gradients": gradients,
        "weights": gather_weights(model),
        "average": gather_weights(trainer.reference.average.model),
    }

    if job["parity_only"]:
        return result

    # Another step with a KL term, now that reference and policy differ.
    recipe.algorithm.kl_coefficient = 0.04
    trainer.reference.all_tokens = True
    trainer.reference.score_answers(groups)
    trainer.credit(groups)
    result["with_kl"] = updated(trainer.policy, groups)
    recipe.algorithm.kl_coefficient = 0.0

    # And one whose sampler was another model than the trainer.
    for group in groups:
        for number, completion in enumerate(group.completions):
            chances = torch.arange(completion.length) % 7 + number
            completion.log_probs = -0.4 * chances.float()
    recipe.rollout.importance_sampling.enabled = True
    result["weighted"] = updated(trainer.policy, groups)
    recipe.rollout.importance_sampling.enabled = False

    # A trainer's own first step, from prompts to EMA.
    trainer = small_trainer(recipe, ranks, folder / f"{name}-step")
    trainer.record(one_step(trainer))
    result["files"] = str(folder / f"{name}-step")

    # A run that one process began, resumed in this layout.
    begun, resumed = folder / "begun", folder / f"{name}-resumed"
    if not begun.exists():
        recipe.trainer.max_steps = 2
        small_trainer(recipe, ranks, begun).fit()
        recipe.trainer.max_steps = 4
    if ranks.rank == 0:
        shutil.copytree(begun, resumed)
    ranks.barrier()
    small_trainer(recipe, ranks, resumed).fit()
    return result


def gather_vocabulary(logits, ranks: Ranks):
    """Logits [B, S, V] of the last stage, its vocabulary slices joined, on rank 0."""
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, logits)
    parts = [part for part in everyone if part is not None][: ranks.layout.tensor]
    return torch.cat(parts, dim=-1)


def main(run: Callable[[Path, str, Ranks], dict], layouts: dict[str, Layout]) -> None:
    """Be one rank of `PROGRAM FOLDER LAYOUT`, and write what `run` finds there."""
    folder, name = Path(sys.argv[1]), sys.argv[2]
    ranks = Ranks(layouts[name], RankEnvironment.read())
    result = run(folder, name, ranks)
    if ranks.rank == 0:
        torch.save(result, folder / f"{name}.pt")
    ranks.close()


if __name__ == "__main__":
    main(run, LAYOUTS)
