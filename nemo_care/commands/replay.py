"""The command `nemo-care replay`: recompute a step that a run left out, group by group.

    nemo-care replay runs/mine --step 12
    nemo-care replay runs/mine --step 12 trainer.devices=1 model.tensor_model_parallel_size=1

It runs the stored completions, reading their media again, in any layout, with the newest checkpoint
that is not newer than the step, and reports what is finite and what is not. Nothing is trained.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_care.checkpoints.run_recipe import recipe_of_run
from nemo_care.commands.start import Command, start
from nemo_care.errors import InputError
from nemo_care.process.screen import say
from nemo_care.recipe.schema import Recipe

if TYPE_CHECKING:
    import torch

    from nemo_care.groups.files import StoredGroup
    from nemo_care.groups.group import Group
    from nemo_care.ranks.process_groups import Ranks
    from nemo_care.training.policy import Policy

_EPILOG = """\
Overrides set what differs from the run, such as the layout (trainer.devices,
model.tensor_model_parallel_size); the rest is the run's recipe. It needs the memory of training."""


@dataclass
class GroupReplay:
    """The results of one group on one rank.

    `module` is the first module whose output was not finite; `parameters` are those whose gradient
    was not finite, in forward order. `loss` (summed over the completions; can be non-finite) and
    `bad_completions` are set on the last stage only.
    """

    module: str | None = None
    parameters: list[str] = field(default_factory=list)
    loss: float | None = None
    bad_completions: list[int] = field(default_factory=list)

    @property
    def is_finite(self) -> bool:
        """Whether everything on this rank was finite."""
        bad = self.module is not None or self.parameters or self.bad_completions
        return not bad and (self.loss is None or math.isfinite(self.loss))


def main(arguments: Sequence[str]) -> int:
    """Run the command line of `nemo-care replay` and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="nemo-care replay",
        description="Recompute a step that a run left out because of non-finite numbers, and "
        "report for each group and completion what is finite and what is not.",
        epilog=_EPILOG,
    )
    parser.add_argument("run", type=Path, help="the run directory")
    parser.add_argument("--step", type=int, required=True, help="a step of its bad_steps/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe overrides")
    options = parser.parse_intermixed_args(list(arguments))
    run = options.run.resolve()
    return start(
        Command(
            name="replay",
            purpose="",
            examples=(),
            check=lambda recipe: _check(recipe, run, options.step),
            run=lambda recipe, ranks, _: _replay(recipe, ranks, run, options.step),
            compose=lambda _: _recipe(run, options.overrides),
            rank_arguments=[str(run), "--step", str(options.step)],
        ),
        arguments,
    )


def _recipe(run: Path, overrides: Sequence[str]) -> Recipe:
    """Return the run's recipe without its vLLM engines, since nothing is sampled here."""
    recipe = recipe_of_run(run, overrides=overrides)
    recipe.rollout.backend, recipe.rollout.asynchronous = "megatron", False
    return recipe


def _check(recipe: Recipe, run: Path, step: int) -> None:
    from nemo_care.checks.recipe import check_training_inputs
    from nemo_care.groups.files import read_groups
    from nemo_care.runs.files import RunFiles, step_of_file

    file = RunFiles(run).bad_step(step)
    if not file.is_file():
        found = (step_of_file(path) for path in file.parent.glob("step_*.json"))
        stored = sorted(step for step in found if step is not None)
        raise InputError(
            f"{run}: step {step} was not left out; steps left out in this run: "
            f"{', '.join(map(str, stored)) or 'none'}"
        )
    read_groups(file)  # reports a fault once, not on every rank
    check_training_inputs(recipe)


def _replay(recipe: Recipe, ranks: "Ranks", run: Path, step: int) -> None:
    """Replay on one rank, from start to end."""
    from nemo_care.data.tokenizer import load_tokenizer
    from nemo_care.groups.batching import BatchLayout
    from nemo_care.groups.files import read_groups
    from nemo_care.runs.files import RunFiles
    from nemo_care.training.build import build_model
    from nemo_care.training.model_source import ModelSource
    from nemo_care.training.policy import Policy

    file = RunFiles(run).bad_step(step)
    about, stored = read_groups(file)
    if len(stored) % ranks.data_size:
        raise InputError(
            f"the {len(stored)} groups of the step can't be spread over {ranks.data_size} model "
            "replicas: set trainer.devices to another number of ranks"
        )
    checkpoint = ranks.from_rank_zero(lambda: _checkpoint_until(run, step))
    model = build_model(recipe, ranks)
    folder = checkpoint or Path(recipe.model.hf_path)
    ModelSource("model.hf_path", folder, is_checkpoint=checkpoint is not None).load(model)
    tokenizer = load_tokenizer(recipe.model.hf_path, model.family.prompt)
    share = len(stored) // ranks.data_size
    mine = stored[ranks.data_rank * share : (ranks.data_rank + 1) * share]
    groups = ranks.from_leader(
        lambda: _restore(recipe, model.family, tokenizer, mine), for_others=_without_frames
    )
    layout = BatchLayout.of_recipe(recipe, ranks.layout, tokenizer.pad_id, groups_per_batch=1)
    weights = _not_finite_weights(model)
    policy = Policy(model, recipe, ranks, layout)
    batches = layout.batches(groups)
    count = policy.loss_count(batches)
    seen = [_look_at(policy, group, count) for group in groups]
    policy.forward_backward(batches, count)
    norm = policy.gradient_norm()
    policy.clear_gradients()
    everyone = ranks.gather_on_rank_zero((ranks.data_rank, weights, seen))
    if ranks.rank == 0:
        say(f"replay of {file}")
        for line in _report(run, checkpoint, about, stored, everyone, norm):
            say(line)


def _checkpoint_until(run: Path, step: int) -> Path | None:
    """Return the newest checkpoint not newer than the step; None for the run's start."""
    from nemo_care.checkpoints.store import list_checkpoints, step_of

    found = list_checkpoints(run / "checkpoints")
    older = [path for path in found if step_of(path) <= step]
    return older[-1] if older else None


def _restore(recipe: Recipe, family: Any, tokenizer: Any, stored: Sequence["StoredGroup"]) -> Any:
    """Rebuild the groups, with their prompts."""
    from nemo_care.data.mixing import SampleOrder
    from nemo_care.data.prompts import PromptBuilder
    from nemo_care.data.sources import read_training
    from nemo_care.groups.files import restore_groups

    builder = PromptBuilder(recipe.data, family.prompt, tokenizer)
    order = SampleOrder(
        read_training(recipe.data, seed=recipe.trainer.seed),
        seed=recipe.trainer.seed,
        shuffle=recipe.data.train.shuffle,
    )
    return restore_groups(stored, lambda index: builder.build(index, order.sample(index)))


def _without_frames(groups: Sequence["Group"]) -> list["Group"]:
    return [replace(group, prompt=group.prompt.without_frames()) for group in groups]


def _not_finite_weights(model: "torch.nn.Module") -> list[str]:
    return [name for name, p in model.named_parameters() if not bool(p.isfinite().all())]


@contextmanager
def _first_bad_module(model: "torch.nn.Module") -> Iterator[list[str]]:
    """Collect the modules whose output is not finite, in the order in which they run."""
    import torch

    found: list[str] = []

    def hook_of(name: str) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple | list) else (output,)
            floats = [p for p in parts if isinstance(p, torch.Tensor) and p.is_floating_point()]
            if not all(bool(part.isfinite().all()) for part in floats):
                found.append(name)

        return hook

    hooks = [
        module.register_forward_hook(hook_of(name))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _look_at(policy: "Policy", group: "Group", count: "torch.Tensor") -> GroupReplay:
    """Compute loss and gradient of one group; every rank calls it with its replica's group.

    `count` is the loss's count over the whole step.
    """
    from nemo_care.runs.metrics import LOSS

    seen = GroupReplay()
    look = policy.gradients.look

    def look_closely() -> None:
        # Before gradients are summed over the replicas, each of which has a different group.
        look()
        seen.parameters = policy.gradients.parameters_not_finite()

    policy.gradients.look = look_closely  # type: ignore[method-assign]
    try:
        with _first_bad_module(policy.model) as modules:
            results = policy.forward_backward(policy.layout.batches([group]), count)
    finally:
        policy.gradients.look = look  # type: ignore[method-assign]
    seen.module = modules[0] if modules else None
    for result in results:
        seen.loss = float(result.values[LOSS])
        rows = result.log_probs.isfinite().all(dim=1).tolist()
        seen.bad_completions = [number for number, finite in enumerate(rows) if not finite]
    return seen


def _report(
    run: Path,
    checkpoint: Path | None,
    about: dict[str, Any],
    stored: Sequence["StoredGroup"],
    everyone: Sequence[tuple[int, list[str], list[GroupReplay]]],
    norm: float,
) -> Iterator[str]:
    """Yield the lines of the report."""
    from nemo_care.training.step_watch import why

    yield f"then: step {about['step']}, update {about['update'] + 1} of its rollouts was left out, "
    yield f"  not finite: {why(about['not_finite'])}"
    yield from _weights_lines(run, checkpoint, about)
    for rank, (_, weights, _) in enumerate(everyone):
        if weights:
            yield f"weights not finite on rank {rank}: {len(weights)}, the first {weights[0]}"
    replicas = max(replica for replica, _, _ in everyone) + 1
    share = len(stored) // replicas
    for number, group in enumerate(stored):
        replica, place = divmod(number, share)
        seen = [
            (rank, of_rank[place])
            for rank, (its, _, of_rank) in enumerate(everyone)
            if its == replica
        ]
        yield from _group_lines(group, seen)
    yield f"gradient norm of the whole step: {norm:g}"
    fine = all(
        not weights and all(group.is_finite for group in seen) for _, weights, seen in everyone
    )
    if fine and math.isfinite(norm):
        yield (
            "everything is finite now: look for what has changed since (weights above, hardware, "
            "precision)"
        )


def _weights_lines(run: Path, checkpoint: Path | None, about: dict[str, Any]) -> Iterator[str]:
    from megatron.core import dist_checkpointing

    made, name = 0, "those that the run started from"
    if checkpoint is not None:
        common = dist_checkpointing.load_common_state_dict(str(checkpoint))
        made, name = common["policy"]["scheduler"]["num_steps"], str(checkpoint.relative_to(run))
    needed = about["optimizer_steps"]
    if made == needed:
        yield f"weights: {name}, as in the step itself ({made} optimizer steps)"
    else:
        yield (
            f"weights: {name}, after {made} optimizer steps; the failed step used those after "
            f"{needed}, which no checkpoint has: the fault may not appear"
        )


def _group_lines(group: "StoredGroup", seen: Sequence[tuple[int, GroupReplay]]) -> Iterator[str]:
    """Yield a group's lines, from all ranks of its replica."""
    losses = [of_rank.loss for _, of_rank in seen if of_rank.loss is not None]
    bad_now = {number for _, of_rank in seen for number in of_rank.bad_completions}
    completions = group.record["completions"]
    yield (
        f"prompt {group.prompt_index} (sample {group.record['sample_id']}): loss "
        f"{losses[0] / len(completions):g}"
    )
    for number, completion in enumerate(completions):
        then = completion["not_finite"]
        marks = [f"then not finite: {', '.join(then)}"] if then else []
        marks += ["now not finite: policy"] if number in bad_now else []
        tokens = len(group.tensors[f"completions.{number}.token_ids"])
        yield f"  completion {number} ({tokens} tokens): {'; '.join(marks) or 'finite'}"
    for rank, of_rank in seen:
        if of_rank.module is not None:
            yield f"  first output that is now not finite: {of_rank.module} (rank {rank})"
            break
    for rank, of_rank in seen:
        if of_rank.parameters:
            yield (
                f"  gradient now not finite in {len(of_rank.parameters)} parameters of rank {rank},"
                f" nearest to the output: {of_rank.parameters[-1]}"
            )
